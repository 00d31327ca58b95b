"""Value-aware scores against their definition in float64."""

import math

import pytest
import torch

from ib_analysis.scorers import SCORERS, ValueAware, value_aware


def random_prompt(batch=2, heads=4, kv_heads=2, queries=32, tokens=100, head_dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, head_dim, generator=generator)
    keys, values = torch.randn(2, batch, kv_heads, tokens, head_dim, generator=generator)
    return query, keys * 3, values, torch.ones(batch, tokens, dtype=torch.bool)


def materialised_scores(query, keys, values, valid, scaling):
    """By the definition, in float64: every weight, every output, every difference from it."""
    batch, heads, window, head_dim = query.shape
    kv_heads, tokens = keys.shape[1:3]
    rows, keys, values = query.double().reshape(batch, kv_heads, -1, head_dim), keys.double(), values.double()
    hidden = torch.ones(window, tokens, dtype=torch.bool).triu(tokens - window + 1) | ~valid[:, None]  # [B, W, T]
    logits = (rows @ keys.transpose(2, 3) * scaling).masked_fill(hidden.repeat(1, heads // kv_heads, 1)[:, None], -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)  # [B, H_kv, G * W, T]
    change = weights[..., None] * (values[:, :, None] - (weights @ values)[..., None, :])  # [B, H_kv, G * W, T, D]
    return change.square().sum(-1).mean(2).float()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (7, 1)])
@pytest.mark.parametrize("chunk_bytes", [1, 5000, 2**26])
def test_scores_equal_those_of_materialised_attention(monkeypatch, heads, kv_heads, chunk_bytes):
    monkeypatch.setattr(value_aware, "CHUNK_BYTES", chunk_bytes)
    query, keys, values, valid = random_prompt(heads=heads, kv_heads=kv_heads)
    scores = value_aware.value_aware_scores(query, keys, values, valid, 0.25)
    torch.testing.assert_close(scores, materialised_scores(query, keys, values, valid, 0.25), atol=1e-6, rtol=1e-4)


def test_left_padding_gets_nothing_and_changes_nothing():
    query, keys, values, valid = random_prompt(batch=1)
    padded_keys, padded_values = (torch.cat([torch.full((1, 2, 80, 16), 50.0), x], 2) for x in (keys, values))
    padded_valid = torch.cat([torch.zeros(1, 80, dtype=torch.bool), valid], 1)
    scores = value_aware.value_aware_scores(query, padded_keys, padded_values, padded_valid, 0.25)
    assert not scores[:, :, :80].any()
    torch.testing.assert_close(scores[:, :, 80:], value_aware.value_aware_scores(query, keys, values, valid, 0.25))


def test_a_query_that_sees_nothing_counts_as_zero():
    query, keys, values, valid = random_prompt(batch=1, tokens=32)
    valid[:, :4] = False  # the first four queries are padding
    scores = value_aware.value_aware_scores(query, keys, values, valid, 0.25)
    assert scores.isfinite().all()
    torch.testing.assert_close(scores, materialised_scores(query, keys, values, valid, 0.25))


def test_no_tensor_grows_with_queries_times_tokens(monkeypatch):
    monkeypatch.setattr(value_aware, "CHUNK_BYTES", 2**16)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), named=None):
            nonlocal largest
            result = function(*arguments, **(named or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    query, keys, values, valid = random_prompt(batch=1, heads=4, kv_heads=1, tokens=5000)
    with Watch():
        value_aware.value_aware_scores(query, keys, values, valid, 0.25)
    assert largest <= keys.numel()  # 128 query rows times 5000 tokens are eight times as many


def test_refuses_shapes_that_do_not_fit():
    query, keys, values, valid = random_prompt()
    with pytest.raises(ValueError, match="do not fit"):
        value_aware.value_aware_scores(query, keys[:, :, :, :8], values, valid, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        value_aware.value_aware_scores(query, keys[:, :, :16], values[:, :, :16], valid[:, :16], 1.0)
    with pytest.raises(ValueError, match="valid bool"):
        value_aware.value_aware_scores(query, keys, values, valid.float(), 1.0)


def test_tokens_are_ranked_by_rms_attention_times_distance_to_the_output():
    """With loops over heads, on a prefill with padding on the left."""
    tokens, head_dim = 20, 8
    query, (keys, values) = torch.randn(2, 4, tokens, head_dim), torch.randn(2, 2, 2, tokens, head_dim)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[1, :5] = False
    scores = SCORERS["value_aware"](torch.nn.Module(), query, keys, values, valid, head_dim**-0.5)
    for b, first in enumerate((0, 5)):
        for kv in range(2):
            moved = torch.zeros(tokens, dtype=torch.float64)
            for h in range(kv * 2, kv * 2 + 2):
                weights = probabilities(query[b, h], keys[b, kv], valid[b])
                out = weights @ values[b, kv].double()
                distance = (values[b, kv].double()[None] - out[:, None]).norm(dim=-1)  # [M, T]
                moved += (weights * distance).square().sum(0)
            ranked = moved.sqrt()[first:].argsort(descending=True)
            assert torch.equal(scores[b, kv, first:].argsort(descending=True), ranked)


def probabilities(query, keys, valid):
    """Attention [M, T] of a query head in float64, causal, padding hidden."""
    logits = query.double() @ keys.double().T * query.shape[-1] ** -0.5
    hidden = torch.ones(logits.shape).triu(1).bool() | ~valid
    return logits.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("window", [1, 8, 32])
def test_only_the_last_queries_count(window):
    query, keys, values, valid = random_prompt()
    found = ValueAware(window)(torch.nn.Module(), query, keys, values, valid, 0.25)
    torch.testing.assert_close(found, materialised_scores(query[:, :, -window:], keys, values, valid, 0.25), atol=1e-6, rtol=1e-4)
