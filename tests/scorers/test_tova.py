"""TOVA against its definition."""

import torch
from materialised import H_KV, SCALING, attention, left_padded

from ib_analysis.scorers.tova import tova


def test_scores_are_the_last_query_s_weights_over_all_heads():
    query, keys, values, valid = left_padded()
    last = attention(query, keys, valid)[:, :, -1].mean(1)  # [B, T]
    found = tova(torch.nn.Module(), query, keys, values, valid, SCALING)
    torch.testing.assert_close(found.double(), last[:, None].expand(-1, H_KV, -1), atol=1e-6, rtol=1e-4)
