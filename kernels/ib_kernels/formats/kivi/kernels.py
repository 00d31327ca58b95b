"""The kivi format on a GPU: quantize and pack, and unpack. A program takes groups of 32 tokens of a run.

Every step of the arithmetic is the one of `reference`, in the same order, so the bits agree.
Codes are packed by a matrix product with powers of two: word w of a token is the sum of 2**shift times the codes that it
holds, exact in the fp32 accumulators of the matrix instructions, whatever the head dimension.
"""

# ruff: noqa: RET505 - the compiler wants an else where a constant decides

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from ib_kernels.bases import Bases
from ib_kernels.bitpack import words_per_token
from ib_kernels.formats.format import Side, SideName
from ib_kernels.formats.kivi.reference import GROUP_CHANNELS, GROUP_TOKENS
from ib_kernels.quantize_triton import (
    addresses,
    blocks,
    constants,
    divide,
    empty,
    in_range,
    max_blocks,
    source,
    widened,
)
from torch import Tensor

KEY_WARPS, VALUE_WARPS = 1, 2  # of programs that pack up to 128 channels; twice as many above
GROUPS = 8  # that a program packs


def pack(name: SideName, x: Tensor, rows: Tensor, lengths: Tensor, counts: list[int], bits: int, fitted: Side | None) -> Side:
    """One side of `quantize_pack`; `counts` are the lengths. Nothing is fitted."""
    groups, head_dim = blocks(lengths, GROUP_TOKENS, counts), x.shape[3]
    if name == "keys":
        return _pack(pack_keys_kernel, x, rows, groups, (groups.shape[0], head_dim), bits)
    return _pack(pack_values_kernel, x, rows, groups, (rows.shape[0], -(-head_dim // GROUP_CHANNELS)), bits)


def unpack(name: SideName, side: Side, lengths: Tensor, head_dim: int, bits: int) -> Tensor:
    """Rows fp32 [N, D] of one packed side."""
    count = side["words"].shape[0]
    out = empty(torch.float32, side["words"], count, head_dim)
    groups = max_blocks(lengths, GROUP_TOKENS, count)
    if groups.shape[0]:
        tensors = (side["words"], side["scale"], side["minimum"], out)
        selected, launch = unpack_variant(head_dim, bits, name == "keys")
        unpack_kernel[(groups.shape[0],)](groups, *tensors, **selected, **launch)
    return out


def queries(keys: Side, pairs: Tensor, query: Tensor, bases: Bases | None) -> tuple[Tensor, Tensor]:
    """Query rows as they are, and no shifts: any tensor serves."""
    return query, query


def pack_constants(head_dim: int, bits: int) -> dict[str, Any]:
    """Arguments that select one compiled variant of a kernel that packs."""
    return constants(head_dim, bits) | {"DP": triton.next_power_of_2(head_dim), "GROUPS": GROUPS}


def pack_launch(head_dim: int, keys: bool) -> dict[str, int]:
    """How to launch a kernel that packs."""
    return {"num_warps": (KEY_WARPS if keys else VALUE_WARPS) * (1 if head_dim <= 128 else 2), "num_stages": 3}


def unpack_variant(head_dim: int, bits: int, keys: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """The same for `unpack_kernel`, and how to launch it: with fewer warps it spills registers."""
    padded = triton.next_power_of_2(head_dim)
    return {"D": head_dim, "DP": padded, "BITS": bits, "KEYS": keys}, {"num_warps": padded // 16, "num_stages": 3}


def _pack(kernel: Any, x: Tensor, rows: Tensor, groups: Tensor, metadata_shape: tuple[int, int], bits: int) -> Side:
    words = empty(torch.int16, x, rows.shape[0], words_per_token(x.shape[3], bits))
    scale, minimum = (empty(torch.float16, x, *metadata_shape) for _ in range(2))
    selected = pack_constants(x.shape[3], bits)
    count = groups.shape[0]
    if count:
        programs = triton.cdiv(count, selected["GROUPS"])
        launch = pack_launch(x.shape[3], keys=kernel is pack_keys_kernel)
        kernel[(programs,)](x, rows, groups, count, words, scale, minimum, *source(x), **selected, **launch)
    return {"words": words, "scale": scale, "minimum": minimum}


@triton.jit(do_not_specialize=["count", "heads", "length"])
def pack_keys_kernel(
    x,
    rows,
    groups,
    count,
    words,
    scale,
    minimum,
    heads,
    length,
    strides,
    D: tl.constexpr,
    DP: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Quantize and pack groups of 32 tokens of keys.

    x: [B, heads, length, D], and its strides
    rows: int64 [N], the tokens that are kept
    groups: int32 [count, 3], see `blocks_kernel`
    words: int16 [N, D * BITS / 16]
    scale, minimum: fp16 [count, D]
    DP: D padded to a power of two
    GROUPS: that a program takes
    """
    planes = powers(D, DP, BITS)
    d = tl.arange(0, DP)
    begin = tl.program_id(0) * GROUPS
    for group in range(begin, tl.minimum(begin + GROUPS, count)):
        first = tl.load(groups + group * 3).to(tl.int64)
        tokens = tl.load(groups + group * 3 + 1)
        at = tl.minimum(tl.arange(0, 32), tokens - 1)  # a short group repeats its last token, which leaves the range as it is
        live = tl.arange(0, 32) < tokens
        token = addresses(x, rows + first, at, heads, length, strides)
        tile = tl.load(token[:, None] + d[None, :], mask=d[None, :] < D, other=0.0)  # [32, DP]
        tile = widened(tile)
        base, step = span(minimum_of(tile, 0, FUSED), maximum_of(tile, 0, FUSED), BITS, FUSED)  # [DP]
        codes = codes_of(tile, base[None, :], step[None, :], BITS, FUSED)  # [32, DP]
        store_words(words, codes, first, live, planes, D, DP, BITS)
        tl.store(scale + group * D + d, step, mask=d < D)
        tl.store(minimum + group * D + d, base, mask=d < D)


@triton.jit(do_not_specialize=["count", "heads", "length"])
def pack_values_kernel(
    x,
    rows,
    groups,
    count,
    words,
    scale,
    minimum,
    heads,
    length,
    strides,
    D: tl.constexpr,
    DP: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Quantize and pack groups of 32 tokens of values.

    x: [B, heads, length, D], and its strides
    rows: int64 [N], the tokens that are kept
    groups: int32 [count, 3], see `blocks_kernel`
    words: int16 [N, D * BITS / 16]
    scale, minimum: fp16 [N, ceil(D / 32)]
    DP: D padded to a power of two
    GROUPS: that a program takes
    """
    planes = powers(D, DP, BITS)
    d = tl.arange(0, DP)
    begin = tl.program_id(0) * GROUPS
    for group in range(begin, tl.minimum(begin + GROUPS, count)):
        first = tl.load(groups + group * 3).to(tl.int64)
        tokens = tl.load(groups + group * 3 + 1)
        at = tl.minimum(tl.arange(0, 32), tokens - 1)
        live = tl.arange(0, 32) < tokens
        token = addresses(x, rows + first, at, heads, length, strides)
        tile = tl.load(token[:, None] + d[None, :], mask=d[None, :] < D, other=0.0)  # [32, DP]
        tile = widened(tile)
        GP: tl.constexpr = (DP + 31) // 32
        SIZE: tl.constexpr = DP // GP  # 32 channels, or 16 if there are no more
        grouped = tl.reshape(tile, [32, GP, SIZE])
        low, high = grouped, grouped
        if D % SIZE != 0:  # the last group is short
            inside = tl.reshape(tl.arange(0, DP), [GP, SIZE])[None, :, :] < D
            low = tl.where(inside, grouped, float("inf"))
            high = tl.where(inside, grouped, -float("inf"))
        base, step = span(minimum_of(low, 2, FUSED), maximum_of(high, 2, FUSED), BITS, FUSED)  # [32, GP]
        codes = codes_of(grouped, base[:, :, None], step[:, :, None], BITS, FUSED)  # [32, GP, SIZE]
        store_words(words, tl.reshape(codes, [32, DP]), first, live, planes, D, DP, BITS)
        COLUMNS: tl.constexpr = (D + 31) // 32
        g = tl.arange(0, GP)
        at = (first + tl.arange(0, 32))[:, None] * COLUMNS + g[None, :]
        tl.store(scale + at, step, mask=live[:, None] & (g < COLUMNS)[None, :])
        tl.store(minimum + at, base, mask=live[:, None] & (g < COLUMNS)[None, :])


@triton.jit
def span(low, high, BITS: tl.constexpr, FUSED: tl.constexpr):
    """fp16 minimum and scale of groups that span [low, high] (see `reference`)."""
    low = in_range(low)
    minimum = low.to(tl.float16)
    floor = tl.maximum(tl.abs(minimum.to(tl.float32)) * 2.0**-10, 2.0 ** (BITS - 23))
    step = divide(in_range(high) - minimum.to(tl.float32), tl.full([1] * len(high.shape), 2.0**BITS - 1.0, tl.float32), FUSED)
    return minimum, tl.maximum(step, floor, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)


@triton.jit
def minimum_of(x, axis: tl.constexpr, FUSED: tl.constexpr):
    """Minimum along an axis, NaN if there is one."""
    if FUSED:
        return tl.reduce(x, axis, smaller)
    else:  # the interpreter takes a second for that
        return tl.where(tl.max((x != x).to(tl.int32), axis) > 0, float("nan"), tl.min(x, axis))


@triton.jit
def maximum_of(x, axis: tl.constexpr, FUSED: tl.constexpr):
    """Maximum along an axis, NaN if there is one."""
    if FUSED:
        return tl.reduce(x, axis, larger)
    else:
        return tl.where(tl.max((x != x).to(tl.int32), axis) > 0, float("nan"), tl.max(x, axis))


@triton.jit
def smaller(a, b):
    """The smaller of two numbers, NaN if one is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    """The larger of two numbers, NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def codes_of(x, minimum, scale, BITS: tl.constexpr, FUSED: tl.constexpr):
    """Codes of x, int16, with 0x6400 added: the bits of the fp16 number 1024 + code.

    The quotient of an infinite x would be NaN, whose code is 0.
    """
    steps = divide(tl.minimum(x, 1e30) - minimum.to(tl.float32), scale.to(tl.float32), FUSED)
    if not FUSED:  # the maximum of NaN and 0 is 0 on a GPU, NaN in the interpreter
        steps = tl.where(steps == steps, steps, 0.0)
    steps = tl.minimum(tl.maximum(steps, 0.0), 2.0**BITS - 1.0)
    # The low bits of a sum with 1.5 * 2**23 and an even integer are the sum with that integer, rounded half to even.
    return (steps + (12582912.0 + 0x6400)).to(tl.int32, bitcast=True).to(tl.int16)


@triton.jit
def powers(D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """What packs the codes of a token in each plane: fp16 [DP, words], 2**shift where a word holds a channel."""
    if BITS == 3:
        return plane_powers(D, DP, 2), plane_powers(D, DP, 1)
    else:
        return (plane_powers(D, DP, BITS),)


@triton.jit
def plane_powers(D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """`powers` of one plane: fp16 [DP, words]."""
    STRIPE: tl.constexpr = D * BITS // 16
    WP: tl.constexpr = DP * BITS // 16 if DP * BITS > 256 else 16
    channel = tl.arange(0, DP)[:, None]
    held = (channel % STRIPE == tl.arange(0, WP)[None, :]) & (channel < D)
    power = (1 << (channel // STRIPE * BITS)).to(tl.float32)  # at most 2**15 where a code is held
    return tl.where(held, power, 0.0).to(tl.float16)


@triton.jit
def store_words(words, codes, first, live, planes, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """Pack codes [32, DP] (see `codes_of`) and store them in the rows from `first` on."""
    if BITS == 3:
        low, high = codes & 3 | 0x6400, codes >> 2 & 1 | 0x6400
        store_plane(words, low, first, live, planes[0], D * 2 // 16, 0, D * 3 // 16)
        store_plane(words, high, first, live, planes[1], D // 16, D * 2 // 16, D * 3 // 16)
    else:
        store_plane(words, codes, first, live, planes[0], D * BITS // 16, 0, D * BITS // 16)


@triton.jit
def store_plane(words, codes, first, live, plane, STRIPE: tl.constexpr, BEGIN: tl.constexpr, WIDTH: tl.constexpr):
    """Pack codes [32, DP] into one plane: STRIPE words a token, from word BEGIN of WIDTH."""
    packed = tl.dot(codes.to(tl.float16, bitcast=True) - 1024.0, plane)  # [32, words]
    word = tl.arange(0, plane.shape[1])[None, :]
    at = (first + tl.arange(0, 32))[:, None] * WIDTH + BEGIN + word
    tl.store(words + at, packed.to(tl.int32).to(tl.int16), mask=live[:, None] & (word < STRIPE))


@triton.jit
def unpack_kernel(groups, words, scale, minimum, out, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr):
    """Rows of one group of 32 packed tokens.

    groups: int32 [count, 3], see `blocks_kernel`
    words: int16 [N, D * BITS / 16]
    scale, minimum: fp16 [count, D] if KEYS, else [N, ceil(D / 32)]
    out: fp32 [N, D]
    """
    group = tl.program_id(0)
    first = tl.load(groups + group * 3).to(tl.int64)
    live = tl.arange(0, 32) < tl.load(groups + group * 3 + 1)
    row = (first + tl.arange(0, 32))[:, None]
    d = tl.arange(0, DP)[None, :]
    inside = live[:, None] & (d < D)
    if BITS == 3:
        codes = field(words, row, d, inside, D, 2, 0, D * 3 // 16)
        codes += 4 * field(words, row, d, inside, D, 1, D * 2 // 16, D * 3 // 16)
    else:
        codes = field(words, row, d, inside, D, BITS, 0, D * BITS // 16)
    at = group * D + d if KEYS else row * ((D + 31) // 32) + d // 32
    step = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)  # [32, DP]
    base = tl.load(minimum + at, mask=inside, other=0.0).to(tl.float32)  # [32, DP]
    tl.store(out + row * D + d, codes.to(tl.float32) * step + base, mask=inside)  # the product is exact, fused or not


@triton.jit
def field(words, row, d, inside, D: tl.constexpr, BITS: tl.constexpr, BEGIN: tl.constexpr, WIDTH: tl.constexpr):
    """The field of BITS bits that each channel d has in its plane: int32 [32, DP]."""
    STRIPE: tl.constexpr = D * BITS // 16
    word = tl.load(words + row * WIDTH + BEGIN + d % STRIPE, mask=inside, other=0).to(tl.int32)  # [32, DP]
    return (word >> (d // STRIPE * BITS)) & ((1 << BITS) - 1)
