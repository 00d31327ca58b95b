"""The attention kernels against float64, within the errors that are allowed on a GPU."""

import math
import os
from itertools import product

import pytest
import torch
from ib_kernels import Window, unpack_tokens

RELATIVE_L2, OF_LARGEST_VALUE, LOG_SUM_EXP = 3e-3, 5e-4, 2e-4


def random_query(pairs, rows, head_dim, dtype=torch.bfloat16, seed=1):
    return torch.randn(pairs, rows, head_dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(result, expected):
    (out, lse), (expected_out, expected_lse, largest) = result, expected
    assert out.dtype == lse.dtype == torch.float32
    difference = out.double() - expected_out
    norm = expected_out.norm(dim=-1)
    # The bound on the norm is for outputs of the size of a value; an average of many is smaller than what it averages.
    assert (difference.norm(dim=-1) <= RELATIVE_L2 * norm.clamp(min=1e-30)).all()
    assert difference.abs().max().item() <= OF_LARGEST_VALUE * largest
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    seen = expected_lse.isfinite()
    assert (lse.double() - expected_lse)[seen].abs().max().item() <= LOG_SUM_EXP if seen.any() else True


CASES = [
    # format, key bits, value bits, head_dim, query rows, dtype, outlier
    ("kivi", 4, 4, 128, 4, torch.bfloat16, 1.0),
    ("kivi", 2, 2, 128, 4, torch.bfloat16, 200.0),
    ("kivi", 3, 8, 128, 7, torch.float16, 20.0),
    ("kivi", 8, 3, 96, 1, torch.bfloat16, 1.0),
    ("kivi", 2, 4, 96, 4, torch.float32, 200.0),
    ("kivi", 4, 2, 64, 16, torch.bfloat16, 200.0),
    ("kivi", 2, 3, 64, 7, torch.bfloat16, 1.0),
    ("kivi", 8, 8, 256, 4, torch.float16, 200.0),
    ("kivi", 3, 2, 80, 4, torch.bfloat16, 1.0),
    ("kivi", 4, 8, 16, 4, torch.float32, 1.0),
    ("rotated", 4, 4, 128, 4, torch.bfloat16, 1.0),
    ("rotated", 2, 2, 128, 4, torch.bfloat16, 200.0),
    ("rotated", 3, 8, 128, 7, torch.float16, 20.0),
    ("rotated", 8, 3, 96, 1, torch.bfloat16, 1.0),
    ("rotated", 2, 4, 96, 4, torch.float32, 200.0),
    ("rotated", 4, 2, 64, 16, torch.bfloat16, 200.0),
    ("rotated", 2, 3, 64, 7, torch.bfloat16, 1.0),
    ("rotated", 8, 8, 256, 4, torch.float16, 200.0),
    ("rotated", 3, 2, 80, 4, torch.bfloat16, 1.0),
    ("rotated", 4, 8, 16, 4, torch.float32, 1.0),
    ("spectral", 4, 4, 128, 4, torch.bfloat16, 1.0),
    ("spectral", 2, 2, 128, 4, torch.bfloat16, 200.0),
    ("spectral", 3, 8, 128, 7, torch.float16, 20.0),
    ("spectral", 8, 3, 96, 1, torch.bfloat16, 1.0),
    ("spectral", 2, 4, 96, 4, torch.float32, 200.0),
    ("spectral", 4, 2, 64, 16, torch.bfloat16, 200.0),
    ("spectral", 8, 8, 256, 4, torch.float16, 200.0),
    ("spectral", 3, 2, 80, 4, torch.bfloat16, 1.0),
    ("spectral", 3, 8, 16, 4, torch.float32, 1.0),
]


if os.environ.get("TRITON_INTERPRET") != "1":  # a GPU takes no time for all of them
    BITS, HEAD_DIMS = (2, 3, 4, 8), (64, 96, 128, 256)
    CASES += [
        (fmt, key_bits, value_bits, head_dim, rows, torch.bfloat16, 200.0)
        for fmt, key_bits, value_bits, head_dim, rows in product(
            ("kivi", "rotated", "spectral"), BITS, BITS, HEAD_DIMS, (1, 4, 16)
        )
    ]
SHAPES = [
    # lengths, head_dim, query rows, outlier
    ([1], 64, 1, 200.0),
    ([127], 96, 4, 1.0),
    ([128], 128, 7, 200.0),
    ([129], 64, 7, 1.0),
    ([0, 33], 128, 1, 1.0),
    ([70, 0, 5], 96, 7, 200.0),
    ([3, 40], 256, 4, 200.0),
    ([129, 1, 0, 128, 127], 64, 4, 200.0),
    ([40, 3], 16, 20, 1.0),
]


@pytest.mark.parametrize(("fmt", "key_bits", "value_bits", "head_dim", "rows", "dtype", "outlier"), CASES)
def test_every_precision(make_packed, exact_attention, attend, fmt, key_bits, value_bits, head_dim, rows, dtype, outlier):
    packed = make_packed(fmt, [65, 3], head_dim, key_bits, value_bits, outlier)
    query = random_query(2, rows, head_dim, dtype)
    result = attend(query, [packed], None, head_dim**-0.5)
    assert_close(result, exact_attention(query, [packed], None, head_dim**-0.5))


@pytest.mark.parametrize("fmt", ["kivi", "rotated", "spectral"])
@pytest.mark.parametrize(("lengths", "head_dim", "rows", "outlier"), SHAPES)
def test_every_shape(make_packed, exact_attention, attend, fmt, lengths, head_dim, rows, outlier):
    packed = make_packed(fmt, lengths, head_dim, outlier=outlier)
    query = random_query(len(lengths), rows, head_dim)
    result = attend(query, [packed], None, head_dim**-0.5)
    assert_close(result, exact_attention(query, [packed], None, head_dim**-0.5))


@pytest.mark.parametrize("fmt", ["kivi", "rotated", "spectral"])
def test_what_lies_beyond_the_tokens_does_not_count(make_packed, exact_attention, attend, fmt):
    """Storage may have room for more tokens than its runs have: NaN and random codes here."""
    packed = make_packed(fmt, [33, 40], 64, outlier=20.0)
    room = make_packed(fmt, [33, 40, 64], 64, outlier=20.0, pairs=[0, 1, 1])
    for side, wide in ((packed.keys, room.keys), (packed.values, room.values)):
        for name in side:
            if name not in ("centre", "deviations"):
                beyond = wide[name][side[name].shape[0] :]
                side[name] = torch.cat([side[name], beyond * torch.nan if name in ("scale", "minimum") else beyond])
    query = random_query(2, 4, 64)
    held = make_packed(fmt, [33, 40], 64, outlier=20.0)
    assert_close(attend(query, [packed], None, 0.125), exact_attention(query, [held], None, 0.125))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_window_alone(exact_attention, attend, dtype):
    keys, values = torch.randn(2, 3, 70, 96).to(dtype)
    window, query = Window(keys, values), random_query(3, 7, 96)
    assert_close(attend(query, [], window, 0.1), exact_attention(query, [], window, 0.1))


def test_all_together(make_packed, exact_attention, attend):
    """Two sequences of two KV heads, three queries a head, two positions: five parts, causal window with padding."""
    parts = [
        make_packed("kivi", [40, 33], 64, 4, 2, outlier=20.0, pairs=[0, 2]),
        make_packed("rotated", [64, 1], 64, 2, 3, seed=1, pairs=[1, 3]),
        make_packed("rotated", [5, 0, 7], 64, 8, 8, seed=2, pairs=[1, 3, 1]),
        make_packed("kivi", [31, 90], 64, 16, 16, seed=3, pairs=[3, 0]),
        make_packed("spectral", [40, 9], 64, 3, 2, seed=4, pairs=[3, 0]),
    ]
    keys, values = torch.randn(2, 4, 19, 64)
    mask = torch.ones(2, 2, 19, dtype=torch.bool).tril(17)
    mask[1, :, :6] = False
    window, query = Window(keys, values, mask), random_query(4, 6, 64)
    bias = torch.linspace(-2, 2, 24).reshape(4, 6)
    for softcap in (None, 5.0):
        result = attend(query, parts, window, 0.125, softcap, bias)
        assert_close(result, exact_attention(query, parts, window, 0.125, softcap, bias))


def test_one_mask_serves_all_sequences(exact_attention, attend):
    keys, values = torch.randn(2, 4, 9, 32)
    window = Window(keys, values, torch.ones(1, 4, 9, dtype=torch.bool).tril(5))
    query = random_query(4, 20, 32)
    assert_close(attend(query, [], window, 0.2), exact_attention(query, [], window, 0.2))


def test_rows_that_see_nothing_give_zero(make_packed, attend):
    packed = make_packed("rotated", [0, 0], 32)
    window = Window(torch.randn(2, 3, 32), torch.randn(2, 3, 32), torch.zeros(1, 1, 3, dtype=torch.bool))
    query = random_query(2, 4, 32)
    for held in ([], [packed]):
        for shown in (None, window):
            out, lse = attend(query, held, shown, 1.0)
            assert torch.equal(out, torch.zeros(2, 4, 32))
            assert torch.equal(lse, torch.full((2, 4), -torch.inf))


@pytest.mark.parametrize("fmt", ["kivi", "rotated", "spectral"])
def test_the_items_do_not_show(make_packed, attend, fmt):
    packed = make_packed(fmt, [500, 130], 32)
    query = random_query(2, 4, 32)
    one = attend(query, [packed], None, 0.2, items=1)
    many = attend(query, [packed], None, 0.2, items=64)
    for a, b in zip(one, many):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("fmt", ["kivi", "rotated", "spectral"])
def test_many_small_weights_count_beside_a_large_one(make_packed, exact_attention, attend, fmt):
    """Weights of 1e-6 beside one of 1 are below the smallest fp16 number that has full precision."""
    packed = make_packed(fmt, [1000], 16, 8, 8)
    packed.values["scale"][0] *= 8  # what sees most has a large scale, too
    keys = exact_keys(packed)
    direction = keys[0] - keys.mean(0)
    query = (direction / direction.norm() ** 2).to(torch.float32).expand(1, 1, 16).contiguous()
    logits = (keys @ query[0, 0].double())[1:]
    scaling = (13 / (1 - logits.median())).item()
    assert 1e-7 < math.exp(scaling * (logits.median().item() - 1)) < 1e-5
    result = attend(query, [packed], None, scaling)
    assert_close(result, exact_attention(query, [packed], None, scaling))


def exact_keys(packed):
    return unpack_tokens(packed)[0].double()


def test_large_logits_do_not_overflow(make_packed, exact_attention, attend):
    packed = make_packed("kivi", [40], 32, 8, 8)
    query = random_query(1, 4, 32) * 100
    out, lse = attend(query, [packed], None, 10.0)
    expected, expected_lse, _ = exact_attention(query, [packed], None, 10.0)
    torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse.double(), expected_lse, atol=0.0, rtol=1e-5)


def test_scaled_queries_do_not_overflow(make_packed, exact_attention, attend):
    """The product of query and key scale is above what fp16 holds; the logits are not large."""
    packed = make_packed("kivi", [40, 64], 64, 2, 2, outlier=200.0)
    query = random_query(2, 4, 64) * 1000
    assert query.float().abs().max() * packed.keys["scale"].float().max() > 65504
    assert_close(attend(query, [packed], None, 1e-4), exact_attention(query, [packed], None, 1e-4))


@pytest.mark.parametrize("bits", [2, 4])
def test_any_key_scale(make_packed, exact_attention, attend, bits):
    """Up to the largest that fp16 keys have; an offset in all keys drops out of the softmax."""
    packed = make_packed("kivi", [40, 64], 64, bits, bits, outlier=25000.0)
    assert packed.keys["scale"].max() > 2047 * 4 / bits
    query = random_query(2, 4, 64)
    assert_close(attend(query, [packed], None, 1e-5), exact_attention(query, [packed], None, 1e-5))


def test_the_default_dtype_does_not_show(make_packed, exact_attention, attend):
    parts = [make_packed("kivi", [40, 3], 64), make_packed("rotated", [5, 33], 64), make_packed("spectral", [9, 20], 64)]
    query = random_query(2, 4, 64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        result = attend(query, parts, None, 0.125)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(result, exact_attention(query, parts, None, 0.125))
