import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ib_kernels import merge, partial_attention


def full_attention(query, keys, values, mask, scaling, softcap=None):
    """Float64 softmax attention, rows that see nothing giving 0."""
    logits = query.double() @ keys.double().transpose(1, 2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(logits, -1).nan_to_num(0.0)
    return weights @ values.double(), torch.logsumexp(logits, -1)


def random_case(runs, rows, tokens, head_dim, seed, sharpness=1.0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(runs, rows, head_dim, generator=generator) * sharpness
    keys, values = torch.randn(2, runs, tokens, head_dim, generator=generator)
    mask = torch.rand(runs, rows, tokens, generator=generator) < 0.7
    return query, keys, values, mask


@given(
    runs=st.integers(1, 3),
    rows=st.integers(1, 4),
    tokens=st.integers(0, 40),
    head_dim=st.sampled_from([8, 20, 40, 80]),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    softcap=st.sampled_from([None, 20.0]),
    sharpness=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_merged_parts_equal_full_attention(runs, rows, tokens, head_dim, cuts, softcap, sharpness, seed):
    query, keys, values, mask = random_case(runs, rows, tokens, head_dim, seed, sharpness)
    scaling = 1 / math.sqrt(head_dim)
    bounds = sorted({0, tokens, *(min(cut, tokens) for cut in cuts)})
    parts = [
        partial_attention(query, keys[:, a:b], values[:, a:b], mask[:, :, a:b], scaling, softcap)
        for a, b in zip(bounds, [*bounds[1:], tokens])
    ]
    out, lse = merge([out for out, _ in parts], [lse for _, lse in parts])
    expected_out, expected_lse = full_attention(query, keys, values, mask, scaling, softcap)
    torch.testing.assert_close(out.double(), expected_out, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-5)


def test_one_mask_row_serves_all_query_rows():
    query, keys, values, mask = random_case(2, 3, 9, 16, seed=0)
    shared = mask[:, :1]
    out, lse = partial_attention(query, keys, values, shared, 0.25)
    expected_out, expected_lse = partial_attention(query, keys, values, shared.expand(2, 3, 9), 0.25)
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("tokens", [0, 5])
def test_rows_that_see_nothing_give_zero(tokens):
    query, keys, values, mask = random_case(2, 3, tokens, 8, seed=1)
    nothing = torch.zeros_like(mask)
    out, lse = partial_attention(query, keys, values, nothing, 1.0)
    assert torch.equal(out, torch.zeros(2, 3, 8))
    assert torch.equal(lse, torch.full((2, 3), -torch.inf))
    merged, merged_lse = merge([out, out], [lse, lse])
    assert torch.equal(merged, out)
    assert torch.equal(merged_lse, lse)


def test_merging_with_an_unseen_part_changes_nothing():
    query, keys, values, mask = random_case(2, 3, 6, 8, seed=2)
    out, lse = partial_attention(query, keys, values, mask, 1.0)
    merged, merged_lse = merge([out, torch.zeros_like(out)], [lse, torch.full_like(lse, -torch.inf)])
    assert torch.equal(merged, out)
    assert torch.equal(merged_lse, lse)


def test_large_logits_do_not_overflow():
    query = torch.full((1, 1, 8), 1e4)
    keys = torch.cat([torch.full((1, 1, 8), 1e2), torch.full((1, 1, 8), -1e2)], dim=1)
    out, lse = partial_attention(query, keys, keys, torch.ones(1, 1, 2, dtype=torch.bool), 1.0)
    assert torch.equal(out, keys[:, :1])
    assert lse.item() == pytest.approx(8e6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_computes_in_float32(dtype):
    query, keys, values, mask = random_case(1, 2, 7, 16, seed=3)
    query, keys, values = query.to(dtype), keys.to(dtype), values.to(dtype)
    out, lse = partial_attention(query, keys, values, mask, 0.25)
    assert out.dtype == lse.dtype == torch.float32
    expected, _ = full_attention(query, keys, values, mask, 0.25)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_refuses_shapes_that_do_not_fit():
    query, keys, values, mask = random_case(2, 3, 6, 8, seed=4)
    with pytest.raises(ValueError, match=r"\[P, T, D\]"):
        partial_attention(query, keys[:1], values, mask, 1.0)
    with pytest.raises(ValueError, match="boolean mask"):
        partial_attention(query, keys, values, mask.float(), 1.0)
    with pytest.raises(ValueError, match="boolean mask"):
        partial_attention(query, keys, values, mask[:, :2], 1.0)
    with pytest.raises(ValueError, match="one of each"):
        merge([], [])
