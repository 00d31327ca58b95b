"""Attention to packed tokens in plain torch, against float64 on what they stand for."""

import pytest
import torch
from ib_kernels import Window, packed_attention


def assert_exact(result, expected):
    torch.testing.assert_close(result[0].double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result[1].double(), expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_parts_and_window_are_one_sequence(make_packed, exact_attention, softcap, with_bias):
    """Two sequences of two KV heads, three queries a head, two positions; a pair in several parts, and twice in one."""
    parts = [
        make_packed("kivi", [40, 33], 40, 4, 2, pairs=[0, 2]),
        make_packed("rotated", [5, 0, 7], 40, 8, 8, seed=2, pairs=[1, 3, 1]),
        make_packed("kivi", [31, 90], 40, 16, 16, seed=3, pairs=[3, 0]),
    ]
    keys, values = torch.randn(2, 4, 19, 40)
    mask = torch.ones(2, 2, 19, dtype=torch.bool).tril(17)
    mask[1, :, :6] = False
    window, query = Window(keys, values, mask), torch.randn(4, 6, 40)
    bias = torch.linspace(-2, 2, 24).reshape(4, 6) if with_bias else None
    result = packed_attention(query, parts, window, 0.2, softcap, bias)
    assert_exact(result, exact_attention(query, parts, window, 0.2, softcap, bias))


def test_rows_that_see_nothing_give_zero(make_packed):
    empty = make_packed("rotated", [0, 0], 16)
    hidden = Window(torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.zeros(1, 1, 3, dtype=torch.bool))
    for parts in ([], [empty]):
        for window in (None, hidden):
            out, lse = packed_attention(torch.randn(2, 4, 16), parts, window, 1.0)
            assert torch.equal(out, torch.zeros(2, 4, 16))
            assert torch.equal(lse, torch.full((2, 4), -torch.inf))


def test_large_logits_do_not_overflow(make_packed, exact_attention):
    part = make_packed("kivi", [40], 32, 8, 8)
    query = torch.randn(1, 4, 32) * 1000
    out, lse = packed_attention(query, [part], None, 10.0)
    expected, expected_lse, _ = exact_attention(query, [part], None, 10.0)
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, atol=0.0, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_query_computes_in_float32(make_packed, exact_attention, dtype):
    part = make_packed("rotated", [20, 3], 32)
    query = torch.randn(2, 4, 32).to(dtype)
    result = packed_attention(query, [part], None, 0.2)
    assert result[0].dtype == result[1].dtype == torch.float32
    assert_exact(result, exact_attention(query, [part], None, 0.2))


def test_the_default_dtype_does_not_show(make_packed, exact_attention):
    part, query = make_packed("kivi", [20, 3], 32), torch.randn(2, 4, 32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        result = packed_attention(query, [part], None, 0.2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_exact(result, exact_attention(query, [part], None, 0.2))


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (Window(torch.zeros(2, 5, 16), torch.zeros(2, 4, 16)), "must both be"),
        (Window(torch.zeros(3, 5, 16), torch.zeros(3, 5, 16)), "must both be"),
        (Window(torch.zeros(2, 5, 16), torch.zeros(2, 5, 16), torch.ones(1, 3, 5, dtype=torch.bool)), "multiple of M"),
        (Window(torch.zeros(2, 5, 16), torch.zeros(2, 5, 16), torch.ones(1, 4, 5)), "must be bool"),
    ],
)
def test_refuses_a_window_that_does_not_fit(window, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(torch.zeros(2, 4, 16), [], window, 1.0)


def test_refuses_another_head_dim_and_bias(make_packed):
    part = make_packed("kivi", [3, 3], 32)
    with pytest.raises(ValueError, match="head_dim"):
        packed_attention(torch.zeros(2, 4, 16), [part], None, 1.0)
    with pytest.raises(ValueError, match="bias must be"):
        packed_attention(torch.zeros(2, 4, 32), [part], None, 1.0, bias=torch.zeros(2, 3))
