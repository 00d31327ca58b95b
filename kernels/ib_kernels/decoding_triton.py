"""Attention over packed tokens. A program of one warp, or of two, takes the tokens of an item, 32 or 64 at a time.

S^T = K q^T and O^T = V^T p^T, so that the few query rows are the narrow side of the matrix instructions. Codes enter them as
they are: the key scale of a channel is folded into the query, or that of a token into the logits, and the
value scale into the weights; what minima and centred codes add is summed once a token or once an item.
"""

# ruff: noqa: RET505 - the compiler wants an else where a constant decides
# mypy: disable-error-code=assignment

from __future__ import annotations

import math
import os
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from ib_kernels.fields_triton import codes, columns, read_high, read_words, tiles
from ib_kernels.formats import get_kernels
from ib_kernels.formats.spectral.logits import quarter_logits, quarters, spending, spent
from ib_kernels.launch_table import MAX_NARROW_ROWS, Asked, find
from ib_kernels.logits_triton import exponent, grouped_logits, read_query, tanh, token_logits
from ib_kernels.packed import Packed
from torch import Tensor
from triton.runtime.jit import MockTensor

LN2 = tl.constexpr(math.log(2))
ASSEMBLY = os.environ.get("TRITON_INTERPRET") != "1"  # variants with inline assembly, which the interpreter does not have
REGISTERS = 16384  # of each of the four parts of a GPU core; a warp stays in one
RESERVED_BYTES = 1024  # of shared memory, by CUDA for each program
SHARED_UNIT_BYTES = 128  # that CUDA gives shared memory in
SECOND_SHARED_KB = {228: 196, 164: 132, 100: 64}  # the largest share of a core's memory but one that CUDA gives to programs
HEADROOM = tl.constexpr(14.0)  # the largest product of weight and scale is below 2**15
MIN_POSITIVE = tl.constexpr(2.0**-24)  # of fp16


class PackedSide(NamedTuple):
    """Keys or values of a part as an argument of `attend_kernel`; the last is any tensor if there is none.

    Of keys in quarters the steps are in place of a scale, and the deviations of a minimum.
    """

    words: Any
    scale: Any
    minimum: Any


TENSORS = {  # of a side, by what has a scale
    "groups": PackedSide("words", "scale", "minimum"),
    "tokens": PackedSide("words", "scale", "scale"),
    "quarters": PackedSide("words", "steps", "deviations"),
}


def attend(
    packed: Packed, query: Tensor, shifts: Tensor, items: Tensor, out: Tensor, lse: Tensor, scaling: float, softcap: float | None
) -> None:
    """Fill the slots of `items` with partial results.

    Args:
        packed: tokens of 2, 3, 4 or 8 bits.
        query: for grouped keys [pairs, R, D]; else fp32 [P, R, D], turned for each run (see `KernelModule.queries`).
        shifts: fp32 [P, R, 2], what to add to the product of turned query and codes, and to the logits; [P, R, 5] for keys in
            quarters, whose products are apart; unused if grouped.
        items: int32 [W, 5] of a `Schedule`.
        out, lse: fp32 [slots, R, D] and [slots, R]; the output is still rotated if the query is.
    """
    rows, scales = query.shape[1], get_kernels(packed.format).scales
    precision = (packed.head_dim, packed.key_bits, packed.value_bits)
    fp32 = query.dtype == torch.float32
    asked = Asked(scales, *precision, rows > MAX_NARROW_ROWS, fp32, softcap is not None, capability(query))
    constants, launch = variant(asked)
    value_tensors = TENSORS["groups" if scales == "groups" else "tokens"]
    attend_kernel[(items.shape[0], -(-rows // constants["M"]))](
        query,
        shifts,
        packed.pairs,
        PackedSide(*(packed.keys[name] for name in TENSORS[scales])),
        PackedSide(*(packed.values[name] for name in value_tensors)),
        items,
        out,
        lse,
        scaling,
        1.0 if softcap is None else softcap,
        rows,
        **constants,
        **launch,
        ASM=ASSEMBLY,
    )


def capability(tensor: Tensor) -> int:
    """80, 90, 100, ... of the GPU that holds the tensor; 0 on a CPU."""
    if not tensor.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


@cache
def variant(asked: Asked) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants that select one compiled variant of `attend_kernel`, and how to launch it."""
    row = find(asked)
    constants = {
        "GROUPED": asked.scales == "groups",
        "SPENDING": spending(asked.key_bits) if asked.scales == "quarters" else None,
        "D": asked.head_dim,
        "M": row.M,
        "N": row.N,
        "G": triton.next_power_of_2(-(-asked.head_dim // 32)),  # groups of channels, and what pads them
        "SPLIT": asked.fp32,
        "SOFTCAP": asked.softcap,
        "K": (quarters if asked.scales == "quarters" else tiles)(asked.head_dim, asked.key_bits),
        "V": tiles(asked.head_dim, asked.value_bits),
    }
    return constants, {"num_warps": row.num_warps, "num_stages": row.num_stages, "maxnreg": row.maxnreg}


@cache
def programs_per_core(asked: Asked, dtype: torch.dtype, device: torch.device) -> int:
    """How many programs of attention to such tokens a GPU core runs at a time, for a query of this dtype."""
    constants, launch = variant(asked)
    side = PackedSide(MockTensor(torch.int16), MockTensor(torch.float16), MockTensor(torch.float16))
    keys = side._replace(scale=MockTensor(torch.int16)) if asked.scales == "quarters" else side
    tensors = (dtype, dtype, torch.int32, keys, side, torch.int32, torch.float32, torch.float32)
    with torch.cuda.device(device):
        compiled = attend_kernel.warmup(*tensors, 1.0, 1.0, 1, **constants, **launch, ASM=ASSEMBLY, grid=(1,))
        core_bytes = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return programs_that_fit(launch, compiled.metadata.shared, core_bytes)


def programs_that_fit(launch: dict[str, Any], shared_bytes: int, core_bytes: int) -> int:
    """How many programs the registers of a GPU core hold, and its shared memory.

    CUDA may leave a part of the memory to the core's cache, on an H100 32 of the 228 KB. One program too many for what is left
    would start when the others have ended.
    """
    registers = 32 * (-(-launch["maxnreg"] // 8) * 8)  # of a warp
    by_registers = 4 * (REGISTERS // registers) // launch["num_warps"]
    program_bytes = -(-(shared_bytes + RESERVED_BYTES) // SHARED_UNIT_BYTES) * SHARED_UNIT_BYTES
    core_kb = core_bytes >> 10
    by_memory = (SECOND_SHARED_KB.get(core_kb, core_kb) << 10) // program_bytes
    return max(1, min(by_registers, by_memory))


@triton.jit(do_not_specialize=["R"])
def attend_kernel(
    query,
    shifts,
    pairs,
    keys,
    values,
    items,
    out,
    lse,
    scaling,
    softcap,
    R,
    GROUPED: tl.constexpr,
    SPENDING: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    SPLIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    ASM: tl.constexpr,
):
    """Softmax attention of M query rows of one run to the tokens of one item: output and log-sum-exp, into the item's slot.

    query: [pairs, R, D] if GROUPED, else fp32 [P, R, D]
    shifts: fp32 [P, R, 2 or 5], see `attend`
    pairs: int32 [P]
    keys, values: `PackedSide` of
        words: int16 [tokens, D * BITS / 16]
        scale, minimum: of keys fp16 [blocks, D] if GROUPED, of values [tokens, ceil(D / 32)]; else scale fp16 [tokens, 1].
            With SPENDING of keys the steps int16 [tokens, 1], and the deviations fp16 [P, 4]
    items: int32 [W, 5]: first row, tokens, first block, run, slot
    out, lse: fp32 [slots, R, D], [slots, R]
    scaling, softcap: of the logits
    SPENDING: of keys in quarters (see `Spending`), else None
    M, N: query rows of a program, and tokens of a pass of its loop
    G: groups of 32 channels, padded to a power of two
    SPLIT: whether a query needs two fp16 numbers
    K, V: `Tiles` of keys and of values
    """
    VC: tl.constexpr = V.C
    item = items + tl.program_id(0) * 5
    tokens = tl.load(item + 1)
    if tokens == 0:
        return
    first = tl.load(item).to(tl.int64)
    block = tl.load(item + 2).to(tl.int64)
    run = tl.load(item + 3)
    row = tl.program_id(1) * M + tl.arange(0, M)
    live = row < R
    owner = tl.load(pairs + run) if GROUPED else run
    q_rows = owner * R + row
    # From here on positions within the item, which fit 32 bits.
    k_words = keys.words + first * (D * K.BITS // 16)
    v_words = values.words + first * (D * V.BITS // 16)
    k_scale = keys.scale + (block * D if GROUPED else first)
    k_minimum = keys.minimum + block * D
    GROUPS: tl.constexpr = (D + 31) // 32 if GROUPED else 1
    v_scale = values.scale + first * GROUPS
    v_minimum = values.minimum + first * GROUPS
    scale = scaling if SOFTCAP else scaling * 1.4426950408889634
    high, low, unit = read_query(query, q_rows, live, D, K, SPLIT, GROUPED or SPENDING is not None)  # fp16 [C, M] for each tile
    if SPENDING is not None:
        depths, gaussian = spent(keys.minimum + run * 4, SPENDING)
        starts = ()
        for i in tl.static_range(4):
            starts = starts + (tl.load(shifts + q_rows * 5 + i, mask=live, other=0.0) / unit,)  # [M]
        shift = tl.load(shifts + q_rows * 5 + 4, mask=live, other=0.0) * scale
    elif not GROUPED:
        start = tl.load(shifts + q_rows * 2, mask=live, other=0.0)  # [M]
        shift = tl.load(shifts + q_rows * 2 + 1, mask=live, other=0.0)  # [M]
    unit *= scale
    maximum = tl.full([M], -float("inf"), tl.float32)
    S: tl.constexpr = 8 if GROUPED else 16  # rows that sums are kept of: where there are more sums, few registers are left
    total = tl.zeros([S, M], tl.float32)
    offsets = (tl.zeros([S, M], tl.float32),) * GROUPS
    acc = (tl.zeros([VC, M], tl.float32),) * (V.H * V.F)
    for t in tl.range(0, tokens, N):
        position = t + tl.arange(0, N)
        rows = tl.minimum(position, tokens - 1)  # rows beyond the end repeat the last token, with weight 0
        if GROUPED:
            bases = read_groups(v_minimum, rows, GROUPS, G)  # early: the compiler does not copy them ahead of their use
            s = grouped_logits(k_words, k_scale, k_minimum, rows, t // 32, high, low, unit, D, M, K, SPLIT, ASM)
        elif SPENDING is not None:
            s = quarter_logits(starts, k_words, k_scale, rows, high, low, depths, gaussian, unit, shift, D, N, M, K, ASM)
        else:
            s = tl.broadcast_to(start[None, :], [N, M])
            s = token_logits(s, k_words, k_scale, rows, high, low, shift, scale, D, K, ASM)
        if SOFTCAP:
            s = tanh(s / softcap) * (softcap * 1.4426950408889634)
        s = tl.where((position < tokens)[:, None], s, -float("inf"))  # [N, M], logits to base 2
        scales, minima, largest = read_scales(v_scale, bases if GROUPED else rows, rows, N, GROUPS, G, GROUPED, V.BITS)
        # Weights are relative to the largest product of weight and scale, which fp16 then holds without overflow; up to a
        # power of two, so that a token that has all the weight loses nothing to rounding.
        new = tl.maximum(maximum, tl.max(s + exponent(largest)[:, None], 0) - HEADROOM)  # [M]
        fade = tl.exp2(maximum - new)  # [M]
        maximum = new
        p = tl.exp2(s - new[None, :])  # [N, M]
        total = total * fade[None, :] + fold(p, N, M, S)
        faded = ()
        weights = ()
        for g in tl.static_range(GROUPS):
            weight = p * scales[g][:, None]  # [N, M]
            offset = p * minima[g][:, None] if GROUPED else weight
            faded = faded + (offsets[g] * fade[None, :] + fold(offset, N, M, S),)
            weights = weights + (weight.to(tl.float16),)
        offsets = faded
        acc = add_values(acc, v_words, rows, weights, fade, GROUPED, D, V, ASM)
    slot = tl.load(item + 4).to(tl.int64)  # read last, not to hold a register through the loop
    sums = tl.sum(total, 0)  # [M]
    store_output(acc, offsets, sums, out + slot * R * D, row, live, GROUPED, D, V)
    tl.store(lse + slot * R + row, (maximum + tl.log2(sums)) * LN2, mask=live)


@triton.jit
def read_scales(
    scale, bases, rows, N: tl.constexpr, GROUPS: tl.constexpr, G: tl.constexpr, GROUPED: tl.constexpr, BITS: tl.constexpr
):
    """For each group of channels the value scale fp32 [N], and the value at code 2**(BITS - 1) if GROUPED; the largest scale.

    bases: the values at code 0 if GROUPED, from `read_groups`
    """
    scales = ()
    minima = ()
    largest = tl.full([N], MIN_POSITIVE, tl.float32)
    if GROUPED:
        numbers = columns(read_groups(scale, rows, GROUPS, G), N, G)
        bases = columns(bases, N, G)
    for g in tl.static_range(GROUPS):
        v_scale = numbers[g].to(tl.float32) if GROUPED else tl.load(scale + rows).to(tl.float32)
        scales = scales + (v_scale,)
        if GROUPED:
            minima = minima + (bases[g].to(tl.float32) + v_scale * 2.0 ** (BITS - 1),)
        largest = tl.maximum(largest, v_scale)
    return scales, minima, largest


@triton.jit
def read_groups(numbers, rows, GROUPS: tl.constexpr, G: tl.constexpr):
    """A number of every group of channels, for each token: [N, G], of which GROUPS columns count."""
    g = tl.arange(0, G)[None, :]
    at = numbers + rows[:, None] * GROUPS + g
    return tl.load(at) if G == GROUPS else tl.load(at, mask=g < GROUPS, other=0.0)


@triton.jit
def add_values(acc, words, rows, weights, fade, GROUPED: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr, ASM: tl.constexpr):
    """Faded accumulators plus V^T p^T, fp32 [C, M] for each tile; weights [N, M] for each group of channels."""
    C: tl.constexpr = TILES.C
    H: tl.constexpr = TILES.H
    F: tl.constexpr = TILES.F
    T: tl.constexpr = TILES.T
    added = ()
    for h in tl.static_range(H):
        x = h * C + tl.arange(0, C)
        w_low = read_words(words, rows, x, D, TILES, False, True)  # [C, N]
        w_high = read_high(words, rows, x, D, TILES, True)
        for i in tl.static_range(F):
            u = codes(w_low, w_high, i, D, TILES, 2.0 ** (TILES.BITS - 1), ASM)  # [C, N]
            o = acc[h * F + i] * fade[None, :]
            o = add_chunk(o, u, weights, i * T + x, i * T + h * C, i * T + (T if h == H - 1 else h * C + C), GROUPED)
            added = added + (o,)
    return added


@triton.jit
def add_chunk(o, u, weights, channel, BEGIN: tl.constexpr, END: tl.constexpr, GROUPED: tl.constexpr):
    """o plus u [C, N] of channels BEGIN to END times weights. These channels are in one group of 32, or in two."""
    FIRST: tl.constexpr = BEGIN // 32 if GROUPED else 0
    LAST: tl.constexpr = (END - 1) // 32 if GROUPED else 0
    if FIRST == LAST:
        return tl.dot(u, weights[FIRST], o)
    else:
        in_first = (channel < LAST * 32)[:, None]
        o = tl.dot(tl.where(in_first, u, 0.0), weights[FIRST], o)
        return tl.dot(tl.where(in_first, 0.0, u), weights[LAST], o)


@triton.jit
def store_output(acc, offsets, sums, out, row, live, GROUPED: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr):
    """Store the output [R, D] of rows [M]: accumulators [C, M] and what offsets [S, M] add, over the sums of weights [M]."""
    C: tl.constexpr = TILES.C
    H: tl.constexpr = TILES.H
    F: tl.constexpr = TILES.F
    T: tl.constexpr = TILES.T
    for h in tl.static_range(H):
        x = h * C + tl.arange(0, C)
        for i in tl.static_range(F):
            offset = offset_of_chunk(offsets, i * T + x, i * T + h * C, i * T + (T if h == H - 1 else h * C + C), GROUPED)
            # Levels that are symmetric about 0 are at the middle of their steps: half a step above code - 2**(bits - 1).
            o = (acc[h * F + i] + (offset if GROUPED else offset * 0.5)) / sums[None, :]
            tl.store(out + row[None, :] * D + (i * T + x)[:, None], o, mask=(x < T)[:, None] & live[None, :])


@triton.jit
def offset_of_chunk(offsets, channel, BEGIN: tl.constexpr, END: tl.constexpr, GROUPED: tl.constexpr):
    """The sum for the group of each channel: [1, M], or [C, M] if there are two."""
    FIRST: tl.constexpr = BEGIN // 32 if GROUPED else 0
    LAST: tl.constexpr = (END - 1) // 32 if GROUPED else 0
    offset = tl.sum(offsets[FIRST], 0)[None, :]
    if FIRST == LAST:
        return offset
    else:
        return tl.where((channel < LAST * 32)[:, None], offset, tl.sum(offsets[LAST], 0)[None, :])


@triton.jit
def fold(x, N: tl.constexpr, M: tl.constexpr, S: tl.constexpr):
    """Sum of every S-th row of x [N, M]: [S, M]. For S = 8 or 16 they are in the same thread, so it costs no exchange."""
    return tl.sum(tl.reshape(x, [N // S, S, M]), 0)
