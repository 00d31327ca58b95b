"""Compactor's two parts against their definitions."""

import pytest
import torch
from materialised import H_KV, SCALING, B, T, left_padded, of_groups

from ib_analysis.scorers.compactor import Compactor, leverage, noncausal_attention


def test_leverage_is_the_diagonal_of_the_hat_matrix():
    x = torch.randn(B, H_KV, T, 8) * 3 + 1
    found = leverage(x)
    centred = (x - x.mean(2, keepdim=True)).double()
    hat = centred @ torch.linalg.pinv(centred)
    torch.testing.assert_close(found.double(), hat.diagonal(dim1=-2, dim2=-1), atol=1e-3, rtol=1e-3)


def test_leverage_of_fewer_tokens_than_channels_is_finite():
    assert leverage(torch.randn(2, 3, 8)).isfinite().all()
    assert leverage(torch.ones(2, 3, 8)).abs().max() < 1e-6


@pytest.mark.parametrize("chunk", [16, 7, 100])
@pytest.mark.parametrize("queries", [T, 13])
def test_attention_is_that_of_the_queries_of_a_token_s_chunk(chunk, queries):
    query, keys, *_ = left_padded(queries)
    found = noncausal_attention(query[0], keys[0], chunk)
    for begin in range(0, T, chunk):
        part, first = slice(begin, begin + chunk), max(begin - (T - queries), 0)
        rows = query[:1, :, first : max(first, begin + chunk - (T - queries))]
        expected = torch.zeros(H_KV, keys[0, :, part].shape[1], dtype=torch.float64)
        if rows.shape[2]:
            tokens = keys[:1, :, part]
            logits = rows.double() @ tokens.double().repeat_interleave(2, 1).mT
            expected = of_groups(logits.softmax(-1).sum(2))[0]
        torch.testing.assert_close(found[:, part].double(), expected, atol=1e-5, rtol=1e-4)


def test_parts_count_in_standard_deviations_and_the_ends_come_first():
    query, keys, values, valid = left_padded()
    plain, both = (Compactor(weight)(torch.nn.Module(), query, keys, values, valid, SCALING)[0] for weight in (0.0, 2.0))
    middle = slice(8, T - 4)
    assert both[:, :8].min() == both[:, -4:].max() == both.max()
    levered = leverage(keys[0, :, middle])
    expected = 2 * (levered - levered.mean()) / levered.std()
    torch.testing.assert_close(both[:, middle] - plain[:, middle], expected, atol=1e-4, rtol=1e-4)
    weights = noncausal_attention(query[0, :, middle], keys[0, :, middle], 256) * values[0, :, middle].norm(dim=-1)
    pooled = torch.nn.functional.pad(weights, (1, 1)).unfold(-1, 3, 1).mean(-1)
    torch.testing.assert_close(plain[:, middle], (pooled - pooled.mean()) / pooled.std(), atol=1e-4, rtol=1e-4)


def test_a_padded_sequence_is_scored_as_it_is_alone():
    query, keys, values, valid = left_padded()
    whole = Compactor()(torch.nn.Module(), query, keys, values, valid, SCALING)[1:, :, 11:]
    q, k, v = (x[1:, :, 11:] for x in (query, keys, values))
    assert torch.equal(whole, Compactor()(torch.nn.Module(), q, k, v, valid[1:, 11:], SCALING))
