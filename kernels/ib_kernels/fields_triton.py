"""How kernels read packed words: tiles of channels, and the fields of a word as fp16 codes.

A tile is a row of words [T] and the T channels that each field position of them holds: pass i of the tile is channels
i * T .. i * T + T - 1. T is a stripe (see `bitpack`), or 16 channels where stripes of 1, 2, 4 or 8 lie side by side. Wider
tiles are read in chunks of C = 32 columns. The high bit of a 3-bit code lies in a plane of its own with the same tiles.
"""

# ruff: noqa: RET505 - the compiler wants an else where a constant decides
# mypy: disable-error-code=assignment

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Tiles(NamedTuple):
    """How a kernel reads the codes of a token, one constant of the kernel: channel x of pass i is channel i * T + x."""

    T: int  # channels of a tile
    C: int  # columns of a chunk
    H: int  # chunks of a tile
    F: int  # passes, the field positions of a tile
    BITS: int


def tiles(head_dim: int, bits: int) -> Tiles:
    """For a head_dim that is a multiple of 16."""
    low_bits = 2 if bits == 3 else bits
    stripe = head_dim * low_bits // 16
    tile = 16 if stripe in (1, 2, 4, 8) else stripe
    chunk = 16 if tile <= 16 else 32
    return Tiles(tile, chunk, -(-tile // chunk), head_dim // tile, bits)


@triton.jit
def columns(x, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """The columns of x [ROWS, COUNT] as a tuple, for COUNT a power of two up to 16."""
    parts = (x,)  # part j has every column whose number ends in the bits of j
    for level in tl.static_range(4):
        if 1 << level < COUNT:
            lower = ()
            upper = ()
            for j in tl.static_range(1 << level):
                left, right = tl.split(tl.reshape(parts[j], [ROWS, COUNT >> (level + 1), 2]))
                lower = lower + (left,)
                upper = upper + (right,)
            parts = lower + upper
    flat = ()
    for j in tl.static_range(COUNT):
        flat = flat + (tl.reshape(parts[j], [ROWS]),)
    return flat


@triton.jit
def read_words(words, rows, x, D: tl.constexpr, TILES: tl.constexpr, HIGH: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Words of the columns x [C] of a tile, for `rows` [N]: int16 [N, C], or [C, N] if TRANSPOSED.

    HIGH selects the plane of the high bits of 3-bit codes. Columns that belong to a stripe further right are shifted,
    so that a field is at the same bits in all columns.
    """
    PLANE: tl.constexpr = 1 if HIGH else (2 if TILES.BITS == 3 else TILES.BITS)
    STRIPE: tl.constexpr = D * PLANE // 16
    FIRST: tl.constexpr = D * 2 // 16 if HIGH else 0
    column = x % STRIPE if STRIPE < TILES.T else x
    row = rows * (D * TILES.BITS // 16) + FIRST
    at = row[None, :] + column[:, None] if TRANSPOSED else row[:, None] + column[None, :]
    inside = x[:, None] < TILES.T if TRANSPOSED else x[None, :] < TILES.T
    w = tl.load(words + at) if TILES.T % TILES.C == 0 else tl.load(words + at, mask=inside, other=0)  # [N, C] or [C, N]
    if STRIPE < TILES.T:
        shift = x // STRIPE * PLANE
        w = ((w.to(tl.int32) & 0xFFFF) >> (shift[:, None] if TRANSPOSED else shift[None, :])).to(tl.int16)
    return w


@triton.jit
def read_high(words, rows, x, D: tl.constexpr, TILES: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Words of the high bits of 3-bit codes; anything for other codes, which have none."""
    if TILES.BITS == 3:
        return read_words(words, rows, x, D, TILES, True, TRANSPOSED)
    else:
        return 0


@triton.jit
def codes(low, high, PASS: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr, OFFSET: tl.constexpr, ASM: tl.constexpr):
    """Codes of one pass minus OFFSET, fp16 and exact, from the words of the low and the high plane."""
    LOW: tl.constexpr = 2 if TILES.BITS == 3 else TILES.BITS
    REPEAT: tl.constexpr = TILES.T * 16 // (D * LOW)  # stripes side by side in a tile; twice as many in the high plane
    BIT: tl.constexpr = LOW * REPEAT * PASS
    if TILES.BITS == 3:
        return _field(low, BIT, 2, 1.0, 0.0, ASM) + _field(high, BIT, 1, 4.0, OFFSET, ASM)
    else:
        return _field(low, BIT, TILES.BITS, 1.0, OFFSET, ASM)


@triton.jit
def _field(w, BIT: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, OFFSET: tl.constexpr, ASM: tl.constexpr):
    """UNIT * the field of BITS bits at BIT of words w int16, minus OFFSET: fp16.

    0x6400 is fp16 1024, whose last mantissa bit counts 1: with the field ORed in at bit E it reads 1024 + field * 2**E.
    One multiplication and addition, exact in fp16, makes it the field.
    """
    E: tl.constexpr = BIT % 8
    MASK: tl.constexpr = ((1 << BITS) - 1) << E
    A: tl.constexpr = UNIT * 0.5**E
    B: tl.constexpr = -1024.0 * UNIT * 0.5**E - OFFSET
    if ASM:  # two words at a time, which the compiler does not find
        if BIT >= 8:
            w = tl.inline_asm_elementwise("shr.u32 $0, $1, 8;", "=r,r", [w], dtype=tl.int16, is_pure=True, pack=2)
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; lop3.b32 t, $1, $2, $3, 0xEA; fma.rn.f16x2 $0, t, $4, $5;}",
            "=r,r,r,r,r,r",
            [
                w,
                tl.full([], MASK, tl.int16),
                tl.full([], 0x6400, tl.int16),
                tl.full([], A, tl.float16),
                tl.full([], B, tl.float16),
            ],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        y = (((w >> (BIT // 8 * 8)) & MASK) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
        return y * A + B
