"""StreamingLLM: the most recent tokens."""

import torch

from ib_analysis.scorers import SCORERS

B, H, H_KV, T, D = 2, 4, 2, 20, 8


def test_recent_tokens_are_preferred():
    query, (keys, values) = torch.randn(B, H, T, D), torch.randn(2, B, H_KV, T, D)
    valid = torch.ones(B, T, dtype=torch.bool)
    scores = SCORERS["streaming_llm"](torch.nn.Module(), query, keys, values, valid, D**-0.5)
    assert torch.equal(scores.argsort(descending=True), torch.arange(T).flip(0).expand(B, H_KV, T))
