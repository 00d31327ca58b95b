"""Knorm against its definition."""

import torch
from materialised import SCALING, left_padded

from ib_analysis.scorers.knorm import knorm


def test_scores_are_minus_the_norms_of_keys():
    query, keys, values, valid = left_padded()
    found = knorm(torch.nn.Module(), query, keys.bfloat16(), values, valid, SCALING)
    torch.testing.assert_close(found, -keys.bfloat16().float().square().sum(-1).sqrt())
