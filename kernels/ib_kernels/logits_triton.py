"""Products of queries with packed keys, for `decoding_triton`."""

# ruff: noqa: RET505 - the compiler wants an else where a constant decides
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl
from ib_kernels.fields_triton import codes, columns, read_high, read_words


@triton.jit
def read_query(
    query,
    rows,
    live,
    D: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    SPLIT: tl.constexpr,
    KIVI: tl.constexpr,
):
    """Query rows of every tile: fp16 [C, M] each, and what fp16 drops of them if SPLIT, else the same again; and a unit.

    The unit, a power of two, is what kivi query rows are divided by: they are below 1 then, and fp16 holds their products with
    any key scale.
    """
    unit = 1.0
    if KIVI:
        largest = 2.0**-100
        for h in tl.static_range(H):
            x = h * C + tl.arange(0, C)
            for i in tl.static_range(F):
                q = read_tile(query, rows, live, i * T + x, x < T, D)
                largest = tl.maximum(largest, tl.max(tl.max(tl.abs(q), 0), 0))
        unit = tl.exp2(exponent(largest) + 1.0)
    high = ()
    low = ()
    for h in tl.static_range(H):
        x = h * C + tl.arange(0, C)
        for i in tl.static_range(F):
            q = read_tile(query, rows, live, i * T + x, x < T, D)
            if KIVI:
                q *= 1.0 / unit
            high = high + (q.to(tl.float16),)
            if SPLIT:
                low = low + ((q - q.to(tl.float16).to(tl.float32)).to(tl.float16),)
            else:
                low = low + (q.to(tl.float16),)
    return high, low, unit


@triton.jit
def read_tile(query, rows, live, channel, inside, D: tl.constexpr):
    """Query rows of some channels, fp32 [C, M]."""
    at = query + rows[None, :].to(tl.int64) * D + channel[:, None]
    return tl.load(at, mask=inside[:, None] & live[None, :], other=0.0).to(tl.float32)


@triton.jit
def exponent(x):
    """log2 of positive x, rounded down."""
    return ((x.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)


@triton.jit
def kivi_logits(
    words,
    scale,
    minimum,
    rows,
    group,
    high,
    low,
    scaling,
    D: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    ASM: tl.constexpr,
):
    """K q^T [32, M] of one group of tokens, times scaling: codes times scaled query, plus minimum times query.

    The scaled query is the sum of two fp16 numbers: channels of large keys need more than its eleven bits.
    """
    s = tl.zeros([32, M], tl.float32)
    bias = tl.zeros([C, M], tl.float32)
    for h in tl.static_range(H):
        x = h * C + tl.arange(0, C)
        w_low = read_words(words, rows, x, D, T, C, BITS, False, False)
        w_high = read_high(words, rows, x, D, T, C, BITS, False)
        scales = read_channels(scale + group * D, x, T, C, F)
        minima_of = read_channels(minimum + group * D, x, T, C, F)
        for i in tl.static_range(F):
            k_scale = scales[i]
            k_minimum = minima_of[i]
            q = high[h * F + i]
            q_low = low[h * F + i]
            scaled, rest = scale_query(q, tl.broadcast_to(k_scale[:, None], [C, M]), ASM)
            u = codes(w_low, w_high, i, D, T, BITS, 0.0, ASM)
            if SPLIT:
                rest += q_low * k_scale[:, None]
            s = tl.dot(u, scaled, s)
            s = tl.dot(u, rest, s)
            if BITS == 2:  # needs fewer registers here, and more at other precisions
                exact = q.to(tl.float32) + q_low.to(tl.float32) if SPLIT else q.to(tl.float32)
                bias += exact * k_minimum.to(tl.float32)[:, None]
            else:
                minima = tl.broadcast_to(k_minimum[None, :], [32, C])
                s = tl.dot(minima, q, s)
                if SPLIT:
                    s = tl.dot(minima, q_low, s)
    if BITS == 2:
        s += tl.sum(bias, 0)[None, :]
    return s * scaling


@triton.jit
def read_channels(numbers, x, T: tl.constexpr, C: tl.constexpr, F: tl.constexpr):
    """A number of every channel, for each pass [C]. They are read at once: copies of less than four bytes cannot overlap."""
    at = numbers + tl.arange(0, F)[None, :] * T + x[:, None]
    return columns(tl.load(at) if T % C == 0 else tl.load(at, mask=(x < T)[:, None], other=0.0), C, F)


@triton.jit
def scale_query(q, scale, ASM: tl.constexpr):
    """q * scale as the sum of two fp16 tensors [C, M]: the rounded product, and what rounding dropped."""
    if ASM:
        product = tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [q, scale], dtype=tl.float16, is_pure=True, pack=2
        )
        rest = tl.inline_asm_elementwise(
            "{.reg .b32 t; neg.f16x2 t, $3; fma.rn.f16x2 $0, $1, $2, t;}",
            "=r,r,r,r",
            [q, scale, product],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
        return product, rest
    else:
        exact = q.to(tl.float32) * scale.to(tl.float32)
        product = exact.to(tl.float16)
        return product, (exact - product.to(tl.float32)).to(tl.float16)


@triton.jit
def rotated_logits(
    s,
    words,
    scale,
    rows,
    high,
    low,
    shift,
    scaling,
    D: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    BITS: tl.constexpr,
    ASM: tl.constexpr,
):
    """K q^T [N, M]: the scale of a token times (codes times query + s), plus the shift that the centre makes."""
    k_scale = tl.load(scale + rows)
    for h in tl.static_range(H):
        x = h * C + tl.arange(0, C)
        w_low = read_words(words, rows, x, D, T, C, BITS, False, False)
        w_high = read_high(words, rows, x, D, T, C, BITS, False)
        for i in tl.static_range(F):
            u = codes(w_low, w_high, i, D, T, BITS, 2.0 ** (BITS - 1), ASM)
            s = tl.dot(u, high[h * F + i], s)
            s = tl.dot(u, low[h * F + i], s)
    return s * (k_scale.to(tl.float32) * scaling)[:, None] + (shift * scaling)[None, :]
