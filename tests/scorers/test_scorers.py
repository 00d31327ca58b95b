"""Scorers against their definitions, written out with loops in float64."""

import math

import pytest
import torch

from ib_analysis.scorers import SCORERS

B, H, H_KV, T, D, M = 2, 4, 2, 20, 8, 20
SCALING = D**-0.5


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    query = torch.randn(B, H, M, D)
    keys, values = torch.randn(2, B, H_KV, T, D)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, :5] = False
    return query, keys, values, valid


def probabilities(block, b, h):
    """Attention [M, T] of query head h in float64, causal, padding hidden."""
    query, keys, _, valid = block
    logits = query[b, h].double() @ keys[b, h // (H // H_KV)].double().T * SCALING
    hidden = torch.ones(M, T).triu(1).bool() | ~valid[b]
    return logits.masked_fill(hidden, -math.inf).softmax(-1)


@pytest.mark.parametrize("name", SCORERS)
def test_shape_and_finiteness(name, block):
    query, keys, values, valid = block
    scores = SCORERS[name](query, keys, values, valid, SCALING)
    assert scores.shape == (B, H_KV, T)
    assert torch.isfinite(scores[0]).all()
    assert torch.isfinite(scores[1, :, 5:]).all()


def test_value_aware_is_rms_attention_times_distance_to_the_output(block):
    query, keys, values, valid = block
    scores = SCORERS["value_aware"](query, keys, values, valid, SCALING)
    for kv in range(H_KV):
        moved = torch.zeros(T, dtype=torch.float64)
        for h in range(kv * 2, kv * 2 + 2):
            weights = probabilities(block, 0, h)
            out = weights @ values[0, kv].double()
            distance = (values[0, kv].double()[None] - out[:, None]).norm(dim=-1)  # [M, T]
            moved += (weights * distance).square().sum(0)
        ranked = moved.sqrt().argsort(descending=True)
        assert torch.equal(scores[0, kv].argsort(descending=True), ranked)


def test_streaming_llm_prefers_recent_tokens(block):
    query, keys, values, valid = block
    scores = SCORERS["streaming_llm"](query, keys, values, valid, SCALING)
    assert torch.equal(scores[0, 0].argsort(descending=True), torch.arange(T).flip(0))
