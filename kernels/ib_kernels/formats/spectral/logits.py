"""Products of queries with spectral keys, for `decoding_triton`: a tile of codes and a step for each quarter of the channels."""

# ruff: noqa: RET505 - the compiler wants an else where a constant decides
# mypy: disable-error-code=assignment

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from ib_kernels.fields_triton import Tiles
from ib_kernels.formats.spectral.reference import GAUSSIAN_ERROR, GAUSSIAN_STEP, NOT_A_NUMBER, PARTS, PATTERNS, TOPS

SHIFTS = 5  # of a query row, see `kernels.queries`
NO_STEP, TOPS_OF, SIZES = tl.constexpr(NOT_A_NUMBER), tl.constexpr(TOPS), tl.constexpr(PARTS)

# Two int16 at a time, which the compiler does not find. What a shift brings from one into the other, a mask removes.
JOIN_TWO_BITS = tl.constexpr(
    "{.reg .b32 t, u; and.b32 t, $1, 0x33333333; shr.u32 u, t, 2; or.b32 t, t, u; and.b32 t, t, 0x0F0F0F0F;"
    " shr.u32 u, t, 4; or.b32 t, t, u; and.b32 $0, t, 0x00FF00FF;}"
)
JOIN_THREE_BITS = tl.constexpr(
    "{.reg .b32 t, u; and.b32 t, $1, 0x33333333; and.b32 u, $2, 0x11111111; shl.b32 u, u, 2; or.b32 t, t, u;"
    " and.b32 $0, t, 0x00070007; shr.u32 u, t, 1; and.b32 u, u, 0x00380038; or.b32 $0, $0, u;"
    " shr.u32 u, t, 2; and.b32 u, u, 0x01C001C0; or.b32 $0, $0, u;"
    " shr.u32 u, t, 3; and.b32 u, u, 0x0E000E00; or.b32 $0, $0, u;}"
)
CENTRE_CODES = tl.constexpr("{.reg .b32 t; shf.r.wrap.b32 t, $1, $1, $2; lop3.b32 t, t, $3, $4, 0xEA; sub.rn.f16x2 $0, t, $5;}")


class Spending(NamedTuple):
    """How the bits of a token may be spent, one constant of a kernel: four numbers of each of four patterns."""

    DEPTHS: tuple[int, ...]  # bits of a channel
    STEPS: tuple[float, ...]  # of a Gaussian, in its deviation
    ERRORS: tuple[float, ...]  # and its error, in its variance


def spending(bits: int) -> Spending:
    """For keys of a precision."""
    depths = tuple(depth for pattern in PATTERNS[bits] for depth in pattern)
    return Spending(depths, tuple(GAUSSIAN_STEP[depth] for depth in depths), tuple(GAUSSIAN_ERROR[depth] for depth in depths))


def quarters(head_dim: int, bits: int) -> Tiles:
    """The tiles of keys: four passes of a quarter of the channels each, for a head_dim that is a multiple of 16."""
    quarter = head_dim // 4
    chunk = 16 if quarter <= 16 else 32
    return Tiles(quarter, chunk, -(-quarter // chunk), 4, bits)


@triton.jit
def spent(deviations, SPENDING: tl.constexpr):
    """How a run spends its bits: depths int32 and Gaussian steps fp32 of its four quarters, as `reference` chooses them.

    deviations: fp16 [4], of the run
    """
    least = squared_loss(deviations, 0, SPENDING)
    depths, steps = pattern(0, SPENDING)
    for p in tl.static_range(3):
        loss = squared_loss(deviations, p + 1, SPENDING)
        less = loss < least
        least = tl.where(less, loss, least)
        other_depths, other_steps = pattern(p + 1, SPENDING)
        chosen_depths = ()
        chosen_steps = ()
        for q in tl.static_range(4):
            chosen_depths = chosen_depths + (tl.where(less, other_depths[q], depths[q]),)
            chosen_steps = chosen_steps + (tl.where(less, other_steps[q], steps[q]),)
        depths = chosen_depths
        steps = chosen_steps
    return depths, steps


@triton.jit
def squared_loss(deviations, PATTERN: tl.constexpr, SPENDING: tl.constexpr):
    """fp64: what a pattern loses of quarters with these deviations."""
    loss = tl.zeros([], tl.float64)
    for q in tl.static_range(4):
        d = tl.load(deviations + q).to(tl.float64)
        loss += d * d * SPENDING.ERRORS[4 * PATTERN + q]
    return loss


@triton.jit
def pattern(PATTERN: tl.constexpr, SPENDING: tl.constexpr):
    """Its depths and Gaussian steps, four each."""
    depths = ()
    steps = ()
    for q in tl.static_range(4):
        depths = depths + (tl.full([], SPENDING.DEPTHS[4 * PATTERN + q], tl.int32),)
        steps = steps + (tl.full([], SPENDING.STEPS[4 * PATTERN + q], tl.float32),)
    return depths, steps


@triton.jit
def quarter_logits(
    starts,
    words,
    steps,
    rows,
    high,
    low,
    depths,
    gaussian,
    unit,
    shift,
    D: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    TILES: tl.constexpr,
    ASM: tl.constexpr,
):
    """K q^T [N, M] times the unit of the query, plus the shift: of each quarter its step times (codes times query + start).

    words, steps: of the item's keys int16 [tokens, D * BITS / 16], [tokens, 1]
    rows: [N] of the tokens, from the item's first
    high, low: fp16 [C, M] for each chunk of a quarter, from `read_query`
    depths, gaussian: from `spent`
    starts, shift: four times [M], and [M]
    """
    C: tl.constexpr = TILES.C
    H: tl.constexpr = TILES.H
    s = ()
    for q in tl.static_range(4):
        s = s + (tl.broadcast_to(starts[q][None, :], [N, M]),)
    for h in tl.static_range(H):
        x = h * C + tl.arange(0, C)
        joined = read_joined(words, rows, x, D, TILES, ASM)  # [N, C]
        begin = tl.zeros([], tl.int32)
        added = ()
        for q in tl.static_range(4):
            u = centred_codes(joined, begin, depths[q], ASM)
            o = tl.dot(u, high[4 * h + q], s[q])
            added = added + (tl.dot(u, low[4 * h + q], o),)
            begin += depths[q]
        s = added
    word = tl.load(steps + rows).to(tl.int32)
    sixths = exponents(word)  # four times [N]
    total = tl.broadcast_to(shift[None, :], [N, M])
    for q in tl.static_range(4):
        total += s[q] * (tl.exp2(sixths[q].to(tl.float32) * (1.0 / 6.0)) * (gaussian[q] * unit))[:, None]
    return tl.where((word & 63 == NO_STEP)[:, None], float("nan"), total)


@triton.jit
def exponents(word):
    """Sixths int32 of the exponents of 2 of a token's four steps, from its word: see TOPS, PARTS and PART_BITS of `reference`."""
    first = TOPS_OF[0] - (word & 63) * SIZES[0]
    return (
        first,
        first + TOPS_OF[1] - (word >> 6 & 15) * SIZES[1],
        first + TOPS_OF[2] - (word >> 10 & 7) * SIZES[2],
        first + TOPS_OF[3] - (word >> 13 & 7) * SIZES[3],
    )


@triton.jit
def centred_codes(joined, begin, depth, ASM: tl.constexpr):
    """The numbers of so many bits at bit `begin`, minus half of how many there are: fp16 and exact.

    0x6400 is fp16 1024, whose last mantissa bit counts 1.
    """
    mask = (1 << depth) - 1
    middle = (1024 + (1 << (depth - 1))).to(tl.float16)
    if ASM and joined.dtype == tl.int16:
        return tl.inline_asm_elementwise(
            CENTRE_CODES,
            "=r,r,r,r,r,r",
            [joined, begin.to(tl.int16), mask.to(tl.int16), tl.full([], 0x6400, tl.int16), middle],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        code = (joined.to(tl.int32) >> begin) & mask
        return (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - middle


@triton.jit
def read_joined(words, rows, x, D: tl.constexpr, TILES: tl.constexpr, ASM: tl.constexpr):
    """For the channels x [C] of a quarter, the codes of all four in one number, 4 * BITS bits, the first quarter's lowest.

    Int16 [N, C], or int32 at 8 bits. In storage they are fields of equal width (see `bitpack`).
    """
    T: tl.constexpr = TILES.T
    BITS: tl.constexpr = TILES.BITS
    inside = (x < T)[None, :]
    row = words + rows[:, None] * (D * BITS // 16)
    if BITS == 4:
        return tl.load(row + x[None, :], mask=inside, other=0)
    elif BITS == 8:
        left = tl.load(row + x[None, :], mask=inside, other=0).to(tl.int32)  # quarters 0 and 2
        right = tl.load(row + T + x[None, :], mask=inside, other=0).to(tl.int32)  # 1 and 3
        return (left & 0xFF) | (right & 0xFF) << 8 | (left & 0xFF00) << 8 | (right & 0xFF00) << 16
    else:
        HALF: tl.constexpr = T // 2
        low = tl.load(row + (x % HALF)[None, :], mask=inside, other=0)
        low = (low.to(tl.int32) >> (x // HALF * 2)[None, :]).to(tl.int16)
        if BITS == 2:
            return join_two_bits(low, ASM)
        else:
            FOURTH: tl.constexpr = T // 4
            high = tl.load(row + D // 8 + (x % FOURTH)[None, :], mask=inside, other=0)
            return join_three_bits(low, (high.to(tl.int32) >> (x // FOURTH)[None, :]).to(tl.int16), ASM)


@triton.jit
def join_two_bits(low, ASM: tl.constexpr):
    """The lowest two of every four bits of words int16, side by side: int16."""
    if ASM:
        return tl.inline_asm_elementwise(JOIN_TWO_BITS, "=r,r", [low], dtype=tl.int16, is_pure=True, pack=2)
    else:
        bits = low.to(tl.int32) & 0x3333
        bits = (bits | bits >> 2) & 0x0F0F
        return ((bits | bits >> 4) & 0xFF).to(tl.int16)


@triton.jit
def join_three_bits(low, high, ASM: tl.constexpr):
    """The same with a third bit, the lowest of every four bits of other words."""
    if ASM:
        return tl.inline_asm_elementwise(JOIN_THREE_BITS, "=&r,r,r", [low, high], dtype=tl.int16, is_pure=True, pack=2)
    else:
        bits = (low & 0x3333).to(tl.int32) | (high & 0x1111).to(tl.int32) << 2
        return ((bits & 0x7) | (bits & 0x70) >> 1 | (bits & 0x700) >> 2 | (bits & 0x7000) >> 3).to(tl.int16)
