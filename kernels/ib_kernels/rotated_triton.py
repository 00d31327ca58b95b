"""The rotated format on a GPU: quantize and pack, and unpack. A program takes up to 32 tokens of a run.

Every step of the arithmetic is the one of `rotated` in plain torch, in the same order, so the bits agree.
A thread holds a whole token, or a part of a large one, as a tuple of tiles of C channels: most butterflies, and all packing,
stay within its registers.
"""


# ruff: noqa: RET505 - the compiler wants an else where a constant decides
# mypy: disable-error-code=assignment

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from ib_kernels.bitpack import words_per_token
from ib_kernels.quantize_triton import FP16_MAX, addresses, constants, empty, in_range, most_pieces, pieces, reciprocal, source
from ib_kernels.rotated import CENTRE_TOKENS, GAUSSIAN_STEP, block_size
from torch import Tensor

TOKENS = 32  # that a program packs or unpacks, a power of two
WARPS = 1  # of such a program, more of them for more than 128 channels
MEAN_OPTIONS = {"num_warps": 4, "num_stages": 2}


def pack(x: Tensor, rows: Tensor, tokens: Tensor, bits: int, centre: Tensor | None) -> dict[str, Tensor]:
    """Parts (see `packed.Packed`) of keys around the centres fp16 [P, D], or of values if there are none.

    Args:
        x, rows: as for `quantize_pack`.
        tokens: the pieces of TOKENS tokens.
    """
    head_dim = x.shape[3]
    words = empty(torch.int16, x, rows.shape[0], words_per_token(head_dim, bits))
    scale = empty(torch.float16, x, rows.shape[0], 1)
    if tokens.shape[0]:
        tensors = (words, scale, scale if centre is None else centre.float())  # converted here once, not by every program
        selected, launch = pack_constants(head_dim, bits, centre is not None), options(head_dim, x.dtype)
        pack_kernel[(tokens.shape[0],)](x, rows, tokens, *tensors, *source(x), **selected, **launch)
    return {"words": words, "scale": scale} | ({} if centre is None else {"centre": centre})


def unpack(part: dict[str, Tensor], lengths: Tensor, head_dim: int, bits: int) -> Tensor:
    """Rows fp32 [N, D] of a part of keys or of values."""
    count = part["words"].shape[0]
    out = empty(torch.float32, part["words"], count, head_dim)
    centred = "centre" in part
    tokens = pieces(lengths, TOKENS, most_pieces(count, lengths.shape[0], TOKENS))
    if tokens.shape[0]:
        tensors = (part["words"], part["scale"], part["centre"] if centred else part["scale"], out)
        selected, launch = pack_constants(head_dim, bits, centred), options(head_dim, torch.float16)
        unpack_kernel[(tokens.shape[0],)](tokens, *tensors, **selected, **launch)
    return out


def centre(keys: Tensor, rows: Tensor, runs: Tensor, count: int) -> Tensor:
    """Mean of a sample of the kept keys of every run (see `rotated`): fp16 [P, D], 0 for an empty run.

    Args:
        keys, rows: as for `quantize_pack`.
        runs: the runs that are not empty, each as one piece.
        count: P.
    """
    head_dim = keys.shape[3]
    means = torch.zeros(count, head_dim, dtype=torch.float16, device=keys.device)
    if runs.shape[0]:
        selected = mean_constants(head_dim)
        programs = runs.shape[0], head_dim // selected["C"]
        mean_kernel[programs](keys, rows, runs, means, *source(keys), **selected, **MEAN_OPTIONS)
    return means


def pack_constants(head_dim: int, bits: int, centred: bool) -> dict[str, Any]:
    """Arguments that select one compiled variant of `pack_kernel` and `unpack_kernel`."""
    block = block_size(head_dim)
    stripe = head_dim // 16 if bits == 3 else head_dim * bits // 16
    return constants(head_dim, bits) | {
        "C": min(8, stripe & -stripe),  # divides every stripe
        "N": TOKENS,
        "BLOCK": block,
        "ROOT": math.sqrt(block),
        "STEP": GAUSSIAN_STEP[bits],
        "CENTRED": centred,
    }


def options(head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """How to launch these kernels for input of a dtype so that none spills registers (kernels/benchmarks/compile.py)."""
    shares = 1 if head_dim <= 128 else 4 if dtype == torch.float32 else 2  # of a token too large for the registers of a thread
    return {
        "num_warps": shares * WARPS,
        "num_stages": 3,
        "maxnreg": 255 if dtype == torch.float32 else None,
        "enable_fp_fusion": False,
    }


def mean_constants(head_dim: int) -> dict[str, int]:
    """The same for `mean_kernel`, a program of which takes 16 channels of a run, N tokens at a time."""
    return {"D": head_dim, "C": 16, "N": 256, "MOST": CENTRE_TOKENS}


@triton.jit(do_not_specialize=["heads", "length"])
def pack_kernel(
    x,
    rows,
    pieces,
    words,
    scale,
    shifts,
    heads,
    length,
    batch_stride,
    head_stride,
    token_stride,
    D: tl.constexpr,
    BITS: tl.constexpr,
    FUSED: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOT: tl.constexpr,
    STEP: tl.constexpr,
    CENTRED: tl.constexpr,
):
    piece = tl.program_id(0)
    first = tl.load(pieces + piece * 3).to(tl.int64)
    tokens = tl.load(pieces + piece * 3 + 1)
    run = tl.load(pieces + piece * 3 + 2).to(tl.int64)
    at = tl.minimum(tl.arange(0, N), tokens - 1)  # beyond the end the last token again
    token = addresses(x, rows + first, at, heads, length, batch_stride, head_stride, token_stride)
    c = tl.arange(0, C)[None, :]
    tiles = ()
    for k in tl.static_range(D // C):
        tile = in_range(tl.load(token[:, None] + k * C + c))  # [N, C]
        if CENTRED:
            tile -= tl.load(shifts + run * D + k * C + c)
        tiles = tiles + (tile,)
    tiles = turn(tiles, D, C, N, BLOCK)
    step = gaussian_step(sum_of_squares(tiles, D, C, N), STEP * STEP / (D * BLOCK))  # [N]
    divisor = tl.maximum(step.to(tl.float32), 2.0**-24, propagate_nan=tl.PropagateNan.ALL)
    per_range = (reciprocal(divisor, FUSED) * (1.0 / (2.0**BITS * ROOT)))[:, None]
    codes = ()
    for k in tl.static_range(D // C):
        codes = codes + (code_of(tiles[k], per_range, BITS, FUSED),)
    row = first + tl.arange(0, N)
    live = tl.arange(0, N) < tokens
    tl.store(scale + row, step, mask=live)
    words += row[:, None] * (D * BITS // 16) + c
    if BITS == 3:
        high = ()
        low = ()
        for k in tl.static_range(D // C):
            high = high + ((codes[k] >> 2) & 1,)
            low = low + (codes[k] & 3,)
        store_plane(words, low, live, D, C, 2)
        store_plane(words + D * 2 // 16, high, live, D, C, 1)
    else:
        store_plane(words, codes, live, D, C, BITS)


@triton.jit
def sum_of_squares(tiles, D: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    """fp64 [N]: every eighth square in fp32, one after another as in `rotated`, and these sums in fp64."""
    total = tl.zeros([N], tl.float64)
    for j in tl.static_range(8 // C):
        lanes = tiles[j] * tiles[j]  # [N, C]
        for k in tl.static_range(j + 8 // C, D // C, 8 // C):
            lanes += tiles[k] * tiles[k]
        total += tl.sum(lanes.to(tl.float64), 1)
    return total


@triton.jit
def code_of(turned, per_range, BITS: tl.constexpr, FUSED: tl.constexpr):
    """The code of a channel (see `rotated`), NaN as the lowest: int32, of which the low 16 bits count."""
    LEVELS: tl.constexpr = 2.0**BITS
    if FUSED:
        # Saturation keeps the share within [0, 1], and makes 0 of NaN. The largest number below LEVELS makes of it a product
        # whose floor is the code. A sum with 1.5 * 2**23 that is rounded down has the floor in its low bits.
        asm: tl.constexpr = (
            "{.reg .f32 share; mul.rn.f32 share, $1, $2; add.rn.sat.f32 share, share, 0f3F000000;"
            " fma.rm.f32 $0, share, $3, 0f4B400000;}"
        )
        below: tl.constexpr = LEVELS * (1 - 2.0**-24)
        return tl.inline_asm_elementwise(asm, "=r,f,f,f", [turned, per_range, below], tl.int32, is_pure=True, pack=1)
    else:
        level = tl.ceil(tl.minimum(turned * per_range + 0.5, 1.0) * LEVELS) - 1.0
        return tl.where(level == level, tl.maximum(level, 0.0), 0.0).to(tl.int32)


@triton.jit
def store_plane(words, codes, live, D: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr):
    """Words [N, D * BITS / 16] of codes int32, each word a sum of codes times powers of two."""
    TILES: tl.constexpr = D * BITS // 16 // C  # of a stripe
    for j in tl.static_range(TILES):
        word = codes[j]
        for s in tl.static_range(1, 16 // BITS):
            word += codes[s * TILES + j] << (s * BITS)
        tl.store(words + j * C, word.to(tl.int16), mask=live[:, None])


@triton.jit
def unpack_kernel(
    pieces,
    words,
    scale,
    centre,
    out,
    D: tl.constexpr,
    BITS: tl.constexpr,
    FUSED: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOT: tl.constexpr,
    STEP: tl.constexpr,
    CENTRED: tl.constexpr,
):
    piece = tl.program_id(0)
    first = tl.load(pieces + piece * 3).to(tl.int64)
    tokens = tl.load(pieces + piece * 3 + 1)
    run = tl.load(pieces + piece * 3 + 2).to(tl.int64)
    row = first + tl.minimum(tl.arange(0, N), tl.maximum(tokens - 1, 0))  # a piece may have no tokens
    c = tl.arange(0, C)[None, :]
    words += row[:, None] * (D * BITS // 16) + c
    step = (tl.load(scale + row).to(tl.float32) * (1.0 / ROOT))[:, None]
    tiles = ()
    for k in tl.static_range(D // C):
        if BITS == 3:
            code = field(words, k, D, C, 2) + 4 * field(words + D * 2 // 16, k, D, C, 1)
        else:
            code = field(words, k, D, C, BITS)
        tiles = tiles + ((code.to(tl.float32) - (2.0**BITS - 1.0) / 2.0) * step,)
    tiles = turn(tiles, D, C, N, BLOCK)
    for k in tl.static_range(D // C):
        tile = tiles[k]
        if CENTRED:
            tile += tl.load(centre + run * D + k * C + c).to(tl.float32)
        tl.store(out + row[:, None] * D + k * C + c, tile, mask=(tl.arange(0, N) < tokens)[:, None])


@triton.jit
def field(words, k: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr):
    """The fields of BITS bits of tile k in a plane: int32 [N, C]."""
    TILES: tl.constexpr = D * BITS // 16 // C
    word = tl.load(words + k % TILES * C).to(tl.int32)
    return (word >> (k // TILES * BITS)) & ((1 << BITS) - 1)


@triton.jit
def turn(tiles, D: tl.constexpr, C: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens [N, D] times the block-Hadamard matrix, added up in the order of `rotated.hadamard`."""
    for stage in tl.static_range(8):
        if 1 << stage < BLOCK:
            turned = ()
            for k in tl.static_range(D // C):
                if 1 << stage < C:
                    turned = turned + (butterfly(tiles[k], C, N, 1 << stage),)
                elif k & ((1 << stage) // C) == 0:
                    turned = turned + (tiles[k] + tiles[k + (1 << stage) // C],)
                else:
                    turned = turned + (tiles[k - (1 << stage) // C] - tiles[k],)
            tiles = turned
    return tiles


@triton.jit
def butterfly(tile, C: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr):
    """Sum and difference of channels that are HALF apart, in tiles [N, C]."""
    pairs = tl.permute(tl.reshape(tile, [N, C // (2 * HALF), 2, HALF]), [0, 1, 3, 2])
    left, right = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(left + right, left - right), [0, 1, 3, 2]), [N, C])


@triton.jit
def gaussian_step(squares, FACTOR: tl.constexpr):
    """fp16 root of squares fp64 [N] times FACTOR: the float root, and one step of Newton's in double precision."""
    target = squares * FACTOR
    root = tl.sqrt(target.to(tl.float32))
    safe = tl.maximum(root, 2.0**-100)
    root64 = root.to(tl.float64)
    step = (root64 + (target - root64 * root64) * (0.5 / safe).to(tl.float64)).to(tl.float32)
    return tl.minimum(step, FP16_MAX, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)


@triton.jit(do_not_specialize=["heads", "length"])
def mean_kernel(
    x,
    rows,
    pieces,
    centre,
    heads,
    length,
    batch_stride,
    head_stride,
    token_stride,
    D: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    MOST: tl.constexpr,
):
    """Mean of at most MOST tokens of a run, in fp64 so that the order does not show in fp16."""
    piece = tl.program_id(0)
    first = tl.load(pieces + piece * 3).to(tl.int64)
    tokens = tl.load(pieces + piece * 3 + 1)
    run = tl.load(pieces + piece * 3 + 2).to(tl.int64)
    spacing = tl.cdiv(tokens, MOST)
    count = tl.cdiv(tokens, spacing)
    d = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros([N, C], tl.float64)
    for t in range(0, count, N):
        at = t + tl.arange(0, N)
        place = tl.minimum(at, count - 1) * spacing
        token = addresses(x, rows + first, place, heads, length, batch_stride, head_stride, token_stride)
        tile = tl.load(token[:, None] + d[None, :], mask=(at < count)[:, None], other=0.0)
        total += in_range(tile).to(tl.float64)
    mean = tl.sum(total, 0) / count.to(tl.float64)
    tl.store(centre + run * D + d, mean.to(tl.float32).to(tl.float16))
