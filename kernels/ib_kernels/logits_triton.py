"""Products of queries with packed keys, for `decoding_triton`."""

# ruff: noqa: RET505 - the compiler wants an else where a constant decides
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl
from ib_kernels.fields_triton import codes, columns, read_high, read_words


@triton.jit
def read_query(query, rows, live, D: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr, DIVIDED: tl.constexpr):
    """Query rows of every tile: fp16 [C, M] each, and what fp16 drops of them if SPLIT, else the same again; and a unit.

    The unit, a power of two, is what query rows are divided by if they are DIVIDED: they are below 1 then, and fp16 holds their
    products with any key scale.
    """
    C: tl.constexpr = TILES.C
    H: tl.constexpr = TILES.H
    F: tl.constexpr = TILES.F
    unit = 1.0
    if DIVIDED:
        largest = 2.0**-100
        for h in tl.static_range(H):
            x = h * C + tl.arange(0, C)
            for i in tl.static_range(F):
                q = read_tile(query, rows, live, i * TILES.T + x, x < TILES.T, D)  # [C, M]
                largest = tl.maximum(largest, tl.max(tl.max(tl.abs(q), 0), 0))
        unit = tl.exp2(exponent(largest) + 1.0)
    high = ()
    low = ()
    for h in tl.static_range(H):
        x = h * C + tl.arange(0, C)
        for i in tl.static_range(F):
            q = read_tile(query, rows, live, i * TILES.T + x, x < TILES.T, D)  # [C, M]
            if DIVIDED:
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
def tanh(x):
    """Hyperbolic tangent, from one power of two."""
    return 1.0 - 2.0 / (tl.exp2(x * 2.885390081777927) + 1.0)


@triton.jit
def exponent(x):
    """log2 of positive x, rounded down."""
    return ((x.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)


@triton.jit
def grouped_logits(
    words,
    scale,
    minimum,
    rows,
    block,
    high,
    low,
    scaling,
    D: tl.constexpr,
    M: tl.constexpr,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    ASM: tl.constexpr,
):
    """K q^T [32, M] of one block of tokens, times scaling: codes times scaled query, plus minimum times query.

    The scaled query is the sum of two fp16 numbers: channels of large keys need more than its eleven bits.
    words, scale, minimum: of the item's keys, as in `attend_kernel`
    rows: [32] of the block's tokens, from the item's first
    block: number of the block in the item
    high, low: fp16 [C, M] for each tile, and scaling: from `read_query`
    """
    C: tl.constexpr = TILES.C
    H: tl.constexpr = TILES.H
    F: tl.constexpr = TILES.F
    BITS: tl.constexpr = TILES.BITS
    s = tl.zeros([32, M], tl.float32)
    bias = tl.zeros([C, M], tl.float32)
    for h in tl.static_range(H):
        x = h * C + tl.arange(0, C)
        w_low = read_words(words, rows, x, D, TILES, False, False)  # [32, C]
        w_high = read_high(words, rows, x, D, TILES, False)
        scales = read_channels(scale + block * D, x, TILES)  # [C] for each pass
        minima_of = read_channels(minimum + block * D, x, TILES)
        for i in tl.static_range(F):
            k_scale = scales[i]
            k_minimum = minima_of[i]
            q = high[h * F + i]
            q_low = low[h * F + i]
            scaled, rest = scale_query(q, tl.broadcast_to(k_scale[:, None], [C, M]), ASM)
            u = codes(w_low, w_high, i, D, TILES, 0.0, ASM)  # [32, C]
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
def read_channels(numbers, x, TILES: tl.constexpr):
    """A number of every channel, for each pass [C]. They are read at once: copies of less than four bytes cannot overlap."""
    T: tl.constexpr = TILES.T
    at = numbers + tl.arange(0, TILES.F)[None, :] * T + x[:, None]  # [C, F]
    return columns(tl.load(at) if T % TILES.C == 0 else tl.load(at, mask=(x < T)[:, None], other=0.0), TILES.C, TILES.F)


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
def token_logits(s, words, scale, rows, high, low, shift, scaling, D: tl.constexpr, TILES: tl.constexpr, ASM: tl.constexpr):
    """K q^T [N, M] of tokens with one scale: it times (codes times query + s), plus the shift that the centre makes.

    words, scale: of the item's keys, as in `attend_kernel`
    rows: [N] of the tokens, from the item's first
    high, low: fp16 [C, M] for each tile, from `read_query`
    s, shift: [N, M], [M]
    """
    H: tl.constexpr = TILES.H
    F: tl.constexpr = TILES.F
    k_scale = tl.load(scale + rows)  # [N]
    for h in tl.static_range(H):
        x = h * TILES.C + tl.arange(0, TILES.C)
        w_low = read_words(words, rows, x, D, TILES, False, False)  # [N, C]
        w_high = read_high(words, rows, x, D, TILES, False)
        for i in tl.static_range(F):
            u = codes(w_low, w_high, i, D, TILES, 2.0 ** (TILES.BITS - 1), ASM)  # [N, C]
            s = tl.dot(u, high[h * F + i], s)
            s = tl.dot(u, low[h * F + i], s)
    return s * (k_scale.to(tl.float32) * scaling)[:, None] + (shift * scaling)[None, :]
