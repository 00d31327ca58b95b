"""The rotated format on a GPU: quantize and pack, and unpack. A program takes up to 32 tokens of a run.

Every step of the arithmetic is the one of `reference`, in the same order, so the bits agree.
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
from ib_kernels.bases import Bases
from ib_kernels.bitpack import words_per_token
from ib_kernels.formats.format import Side, SideName
from ib_kernels.formats.rotated import rotation
from ib_kernels.formats.rotated.reference import CENTRE_TOKENS, GAUSSIAN_STEP, STEP_MULTIPLES, hadamard_order
from ib_kernels.formats.rotated.steps import least_error_step, reciprocal_step
from ib_kernels.quantize_triton import (
    addresses,
    blocks,
    constants,
    empty,
    in_range,
    max_blocks,
    source,
)
from torch import Tensor

TOKENS = 32  # that a program packs or unpacks, a power of two
WARPS = 1  # of such a program, more of them for more than 128 channels
MEAN_LAUNCH = {"num_warps": 4, "num_stages": 2}


def pack(name: SideName, x: Tensor, rows: Tensor, lengths: Tensor, counts: list[int], bits: int, fitted: Side | None) -> Side:
    """One side of `quantize_pack`; `counts` are the lengths. Keys are centred on their `fitted` centre, or a new one."""
    if name == "values":
        centres = None
    elif fitted is not None:
        centres = fitted["centre"]
    else:
        centres = fit_centres(x, rows, blocks(lengths, max([1, *counts]), counts), lengths.shape[0])
    of_tokens, head_dim = blocks(lengths, TOKENS, counts), x.shape[3]
    words = empty(torch.int16, x, rows.shape[0], words_per_token(head_dim, bits))
    scale = empty(torch.float16, x, rows.shape[0], 1)
    if of_tokens.shape[0]:
        tensors = (words, scale, scale if centres is None else centres.float())  # converted here once, not by every program
        selected, launch = pack_constants(head_dim, bits, centres is not None), pack_launch(head_dim, bits, x.dtype)
        pack_kernel[(of_tokens.shape[0],)](x, rows, of_tokens, *tensors, *source(x), **selected, **launch)
    return {"words": words, "scale": scale} | ({} if centres is None else {"centre": centres})


def unpack(name: SideName, side: Side, lengths: Tensor, head_dim: int, bits: int) -> Tensor:
    """Rows fp32 [N, D] of one packed side."""
    count = side["words"].shape[0]
    out = empty(torch.float32, side["words"], count, head_dim)
    centred = name == "keys"
    of_tokens = max_blocks(lengths, TOKENS, count)
    if of_tokens.shape[0]:
        tensors = (side["words"], side["scale"], side["centre"] if centred else side["scale"], out)
        selected, launch = unpack_constants(head_dim, bits, centred), pack_launch(head_dim, bits, torch.float16)
        unpack_kernel[(of_tokens.shape[0],)](of_tokens, *tensors, **selected, **launch)
    return out


def queries(keys: Side, pairs: Tensor, query: Tensor, bases: Bases | None) -> tuple[Tensor, Tensor]:
    """Query rows rotated for each run, and the shifts that half a step and the centre make."""
    return rotation.rotate_query(keys["centre"], pairs, query)


def fit_centres(keys: Tensor, rows: Tensor, runs: Tensor, count: int) -> Tensor:
    """Mean of a sample of the kept keys of every run (see `reference`): fp16 [P, D], 0 for an empty run.

    Args:
        keys, rows: as for `quantize_pack`.
        runs: the runs that are not empty, each as one block.
        count: P.
    """
    head_dim = keys.shape[3]
    means = torch.zeros(count, head_dim, dtype=torch.float16, device=keys.device)
    if runs.shape[0]:
        selected = mean_constants(head_dim)
        programs = runs.shape[0], head_dim // selected["C"]
        mean_kernel[programs](keys, rows, runs, means, *source(keys), **selected, **MEAN_LAUNCH)
    return means


def pack_constants(head_dim: int, bits: int, centred: bool) -> dict[str, Any]:
    """Arguments that select one compiled variant of `pack_kernel`."""
    steps = {"STEP": GAUSSIAN_STEP[bits], "MULTIPLES": STEP_MULTIPLES[bits]}
    return unpack_constants(head_dim, bits, centred) | constants(head_dim, bits) | steps


def unpack_constants(head_dim: int, bits: int, centred: bool) -> dict[str, Any]:
    """Arguments that select one compiled variant of `unpack_kernel`."""
    stripe = head_dim // 16 if bits == 3 else head_dim * bits // 16
    order = hadamard_order(head_dim)
    return {
        "D": head_dim,
        "BITS": bits,
        "C": min(8, stripe & -stripe),  # divides every stripe
        "N": TOKENS,
        "ORDER": order,
        "ROOT": math.sqrt(order),
        "CENTRED": centred,
    }


def pack_launch(head_dim: int, bits: int, dtype: torch.dtype) -> dict[str, Any]:
    """How to launch these kernels for input of a dtype so that none spills registers (kernels/benchmarks/compile.py)."""
    # Of a token too large for the registers of a thread. At 8 bits the compiler holds it twice, for steps and for codes.
    shares = 1 if head_dim <= 128 else 4 if dtype == torch.float32 or bits == 8 else 2
    return {
        "num_warps": shares * WARPS,
        "num_stages": 3,
        "maxnreg": 255 if dtype == torch.float32 else None,
        "enable_fp_fusion": False,
    }


def mean_constants(head_dim: int) -> dict[str, int]:
    """The same for `mean_kernel`, a program of which takes 16 channels of a run, N tokens at a time."""
    return {"D": head_dim, "C": 16, "N": 256, "MAX_TOKENS": CENTRE_TOKENS}


@triton.jit(do_not_specialize=["heads", "length"])
def pack_kernel(
    x,
    rows,
    blocks,
    words,
    scale,
    shifts,
    heads,
    length,
    strides,
    D: tl.constexpr,
    BITS: tl.constexpr,
    FUSED: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    ORDER: tl.constexpr,
    ROOT: tl.constexpr,
    STEP: tl.constexpr,
    MULTIPLES: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Quantize and pack one block of tokens, of keys if CENTRED, else of values.

    x: [B, heads, length, D], and its strides
    rows: int64 [N], the tokens that are kept
    blocks: int32 [count, 3], see `blocks_kernel`
    words: int16 [N, D * BITS / 16]
    scale: fp16 [N, 1]
    shifts: fp32 [P, D], the centres of the runs, if CENTRED
    C, N: channels of a tile, and tokens of a program
    ORDER, ROOT: order of the Hadamard matrix, and its root
    STEP: of the quantizer for a Gaussian, in standard deviations
    MULTIPLES: see `reference.STEP_MULTIPLES`
    """
    block = tl.program_id(0)
    first = tl.load(blocks + block * 3).to(tl.int64)
    tokens = tl.load(blocks + block * 3 + 1)
    run = tl.load(blocks + block * 3 + 2).to(tl.int64)
    at = tl.minimum(tl.arange(0, N), tokens - 1)  # beyond the end the last token again
    token = addresses(x, rows + first, at, heads, length, strides)
    c = tl.arange(0, C)[None, :]
    tiles = ()
    for k in tl.static_range(D // C):
        tile = in_range(tl.load(token[:, None] + k * C + c))  # [N, C]
        if CENTRED:
            tile -= tl.load(shifts + run * D + k * C + c)
        tiles = tiles + (tile,)
    tiles = turn(tiles, D, C, N, ORDER)
    step = least_error_step(tiles, D, BITS, FUSED, C, N, ORDER, ROOT, STEP, MULTIPLES)  # [N]
    per_range = (reciprocal_step(step, FUSED) * (1.0 / (2.0**BITS * ROOT)))[:, None]  # [N, 1]
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
def code_of(turned, per_range, BITS: tl.constexpr, FUSED: tl.constexpr):
    """The code of a channel (see `reference`), NaN as the lowest: int32, of which the low 16 bits count."""
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
    blocks,
    words,
    scale,
    centre,
    out,
    D: tl.constexpr,
    BITS: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    ORDER: tl.constexpr,
    ROOT: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Rows of one block of packed tokens, of keys if CENTRED, else of values.

    blocks: int32 [count, 3], see `blocks_kernel`
    words, scale: int16 [N, D * BITS / 16], fp16 [N, 1]
    centre: fp16 [P, D] if CENTRED
    out: fp32 [N, D]
    """
    block = tl.program_id(0)
    first = tl.load(blocks + block * 3).to(tl.int64)
    tokens = tl.load(blocks + block * 3 + 1)
    run = tl.load(blocks + block * 3 + 2).to(tl.int64)
    row = first + tl.minimum(tl.arange(0, N), tl.maximum(tokens - 1, 0))  # a block may have no tokens
    c = tl.arange(0, C)[None, :]
    words += row[:, None] * (D * BITS // 16) + c
    step = (tl.load(scale + row).to(tl.float32) * (1.0 / ROOT))[:, None]  # [N, 1]
    tiles = ()
    for k in tl.static_range(D // C):
        if BITS == 3:
            code = field(words, k, D, C, 2) + 4 * field(words + D * 2 // 16, k, D, C, 1)
        else:
            code = field(words, k, D, C, BITS)
        tiles = tiles + ((code.to(tl.float32) - (2.0**BITS - 1.0) / 2.0) * step,)
    tiles = turn(tiles, D, C, N, ORDER)
    for k in tl.static_range(D // C):
        tile = tiles[k]  # [N, C]
        if CENTRED:
            tile += tl.load(centre + run * D + k * C + c).to(tl.float32)
        tl.store(out + row[:, None] * D + k * C + c, tile, mask=(tl.arange(0, N) < tokens)[:, None])


@triton.jit
def field(words, k: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr):
    """The fields of BITS bits of tile k in a plane: int32 [N, C]."""
    TILES: tl.constexpr = D * BITS // 16 // C
    word = tl.load(words + k % TILES * C).to(tl.int32)  # [N, C]
    return (word >> (k // TILES * BITS)) & ((1 << BITS) - 1)


@triton.jit
def turn(tiles, D: tl.constexpr, C: tl.constexpr, N: tl.constexpr, ORDER: tl.constexpr):
    """Tokens [N, D] times the block-diagonal Hadamard matrix, added up in the order of `reference.hadamard`."""
    for stage in tl.static_range(8):
        if 1 << stage < ORDER:
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


@triton.jit(do_not_specialize=["heads", "length"])
def mean_kernel(
    x,
    rows,
    blocks,
    centre,
    heads,
    length,
    strides,
    D: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
):
    """Mean of C channels of at most MAX_TOKENS tokens of a run, in fp64 so that the order does not show in fp16.

    x: [B, heads, length, D], and its strides
    rows: int64 [N], the tokens that are kept
    blocks: int32 [count, 3], see `blocks_kernel`; each is a run
    centre: fp16 [P, D]
    """
    block = tl.program_id(0)
    first = tl.load(blocks + block * 3).to(tl.int64)
    tokens = tl.load(blocks + block * 3 + 1)
    run = tl.load(blocks + block * 3 + 2).to(tl.int64)
    spacing = tl.cdiv(tokens, MAX_TOKENS)
    count = tl.cdiv(tokens, spacing)
    d = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros([N, C], tl.float64)
    for t in range(0, count, N):
        at = t + tl.arange(0, N)
        place = tl.minimum(at, count - 1) * spacing
        token = addresses(x, rows + first, place, heads, length, strides)
        tile = tl.load(token[:, None] + d[None, :], mask=(at < count)[:, None], other=0.0)  # [N, C]
        total += in_range(tile).to(tl.float64)
    mean = tl.sum(total, 0) / count.to(tl.float64)
    tl.store(centre + run * D + d, mean.to(tl.float32).to(tl.float16))
