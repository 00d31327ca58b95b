"""Attention over packed tokens. A program of one warp, or of two, takes the tokens of an item, 32 or 64 at a time.

S^T = K q^T and O^T = V^T p^T, so that the few query rows are the narrow side of the matrix instructions. Codes enter them as
they are: the key scale of a channel is folded into the query (kivi), or that of a token into the logits (rotated), and the
value scale into the weights; what minima and centred codes add is summed once a token or once an item.
"""

# ruff: noqa: RET505 - the compiler wants an else where a constant decides
# mypy: disable-error-code=assignment

from __future__ import annotations

import math
import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from ib_kernels.fields_triton import codes, columns, constants, read_high, read_words
from ib_kernels.logits_triton import exponent, kivi_logits, read_query, rotated_logits
from ib_kernels.packed import Packed
from torch import Tensor

LN2 = tl.constexpr(math.log(2))
ASSEMBLY = os.environ.get("TRITON_INTERPRET") != "1"  # variants with inline assembly, which the interpreter does not have
REGISTERS = 16384  # of each of the four parts of a GPU core; a warp stays in one
RESERVED_BYTES = 1024  # of shared memory, by CUDA for each program
FEW_ROWS = 8  # of a query, the narrow side of a matrix instruction
SHARED_UNIT_BYTES = 128  # that CUDA gives shared memory in
SECOND_SHARED_KB = {228: 196, 164: 132, 100: 64}  # the largest share of a core's memory but one that CUDA gives to programs
HEADROOM = tl.constexpr(14.0)  # the largest product of weight and scale is below 2**15
SMALLEST = tl.constexpr(2.0**-24)  # of the positive fp16 numbers


def attend(
    packed: Packed, query: Tensor, shifts: Tensor, items: Tensor, out: Tensor, lse: Tensor, scaling: float, softcap: float | None
) -> None:
    """Fill the slots of `items` with partial results.

    Args:
        packed: tokens of 2, 3, 4 or 8 bits.
        query: kivi [pairs, R, D]; rotated fp32 [P, R, D], rotated for each run (see `rotation_triton`).
        shifts: rotated fp32 [P, R, 2], what to add to the product of rotated query and codes, and to the logits; else unused.
        items: int32 [W, 5] of `plan`.
        out, lse: fp32 [slots, R, D] and [slots, R]; the output of a rotated format is still rotated.
    """
    rows = query.shape[1]
    precision = (packed.key_bits, packed.value_bits)
    selected, launch = _launch(
        packed.format, packed.head_dim, *precision, min(rows, FEW_ROWS + 1), query.dtype, softcap is not None, capability(query)
    )
    minimum = "minimum" if packed.format == "kivi" else "scale"
    attend_kernel[(items.shape[0], -(-rows // selected["M"]))](
        query,
        shifts,
        packed.pairs,
        *(packed.keys[name] for name in ("words", "scale", minimum)),
        *(packed.values[name] for name in ("words", "scale", minimum)),
        items,
        out,
        lse,
        scaling,
        1.0 if softcap is None else softcap,
        rows,
        **selected,
        **launch,
        ASM=ASSEMBLY,
    )


@cache
def _launch(
    fmt: str, head_dim: int, key_bits: int, value_bits: int, rows: int, dtype: torch.dtype, softcap: bool, capability: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`variant` and its `options`, which every layer asks for in every step."""
    selected = variant(fmt, head_dim, key_bits, value_bits, rows, dtype, softcap)
    return selected, options(selected, capability)


def capability(tensor: Tensor) -> int:
    """80, 90, 100, ... of the GPU that holds the tensor; 0 on a CPU."""
    if not tensor.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def variant(
    fmt: str, head_dim: int, key_bits: int, value_bits: int, rows: int, dtype: torch.dtype, softcap: bool
) -> dict[str, Any]:
    """Constants that select one compiled variant of `attend_kernel`."""
    small = fmt == "rotated" and head_dim <= 128 and 3 not in (key_bits, value_bits)
    odd = head_dim & (head_dim - 1) != 0
    wide = small and rows > FEW_ROWS and not odd
    long = small and not wide and (odd or key_bits != 4 or value_bits == 8)
    return {
        "KIVI": fmt == "kivi",
        "D": head_dim,
        "M": 16 if wide else FEW_ROWS,  # query rows and tokens of one pass: what the registers hold
        "N": 64 if long else 32,
        "G": triton.next_power_of_2(-(-head_dim // 32)),  # groups of channels, and what pads them
        "SPLIT": dtype == torch.float32,
        "SOFTCAP": softcap,
        **constants("K", head_dim, key_bits),
        **constants("V", head_dim, value_bits),
    }


def options(selected: dict[str, Any], capability: int) -> dict[str, Any]:
    """How to launch a variant so that none spills registers, found by compiling all (kernels/benchmarks/compile.py).

    A core holds 16 programs of a warp with 128 registers, 12 with up to 168 and 8 with more: the more, the faster.
    """
    head_dim, bits = selected["D"], (selected["KB"], selected["VB"])
    odd = head_dim & (head_dim - 1) != 0
    plain = selected["M"] == 8 and not (odd or selected["SOFTCAP"])
    if not selected["KIVI"]:
        if not plain or 3 in bits or 8 in bits or (capability >= 100 and (head_dim != 128 or bits == (2, 4))):
            return {"num_warps": 1, "num_stages": 2, "maxnreg": 255}
        fewest = selected["N"] == 32 and head_dim <= 128 and capability < 100
        return {"num_warps": 1, "num_stages": 3 if head_dim <= 128 else 2, "maxnreg": 128 if fewest else 168}
    small = not (selected["SPLIT"] or selected["SOFTCAP"] or 3 in bits or bits == (8, 8)) and capability < 100
    if head_dim > 128 or (odd and not small):
        single = odd and bits == (2, 3) and selected["SPLIT"]
        return {"num_warps": 2, "num_stages": 1 if single else 2, "maxnreg": 255}
    if selected["KB"] == 3:
        two = head_dim == 128 and (selected["SPLIT"] or selected["SOFTCAP"])
        return {"num_warps": 2 if two else 1, "num_stages": 1, "maxnreg": 255}
    few = plain and capability < 100 and selected["KB"] in (2, 4) and selected["VB"] != 3 and not selected["SPLIT"]
    return {"num_warps": 1, "num_stages": 3, "maxnreg": 168 if few else 255}


@cache
def programs_per_core(
    fmt: str,
    head_dim: int,
    key_bits: int,
    value_bits: int,
    rows: int,
    dtype: torch.dtype,
    softcap: bool,
    device: torch.device,
) -> int:
    """How many programs of attention to such tokens a GPU core runs at a time, for queries of these rows and this dtype."""
    query = torch.float32 if fmt == "rotated" else dtype
    selected = variant(fmt, head_dim, key_bits, value_bits, rows, query, softcap)
    properties = torch.cuda.get_device_properties(device)
    launch = options(selected, 10 * properties.major + properties.minor)
    numbers, words = torch.float16, torch.int16
    tensors = (
        query,
        query,
        torch.int32,
        words,
        numbers,
        numbers,
        words,
        numbers,
        numbers,
        torch.int32,
        torch.float32,
        torch.float32,
    )
    with torch.cuda.device(device):
        compiled = attend_kernel.warmup(*tensors, 1.0, 1.0, 1, **selected, **launch, ASM=ASSEMBLY, grid=(1,))
    return programs_that_fit(launch, compiled.metadata.shared, properties.shared_memory_per_multiprocessor)


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
    k_words,
    k_scale,
    k_minimum,
    v_words,
    v_scale,
    v_minimum,
    items,
    out,
    lse,
    scaling,
    softcap,
    R,
    KIVI: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    SPLIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KT: tl.constexpr,
    KC: tl.constexpr,
    KH: tl.constexpr,
    KF: tl.constexpr,
    KB: tl.constexpr,
    VT: tl.constexpr,
    VC: tl.constexpr,
    VH: tl.constexpr,
    VF: tl.constexpr,
    VB: tl.constexpr,
    ASM: tl.constexpr,
):
    item = items + tl.program_id(0) * 5
    tokens = tl.load(item + 1)
    if tokens == 0:
        return
    first = tl.load(item).to(tl.int64)
    group = tl.load(item + 2).to(tl.int64)
    run = tl.load(item + 3)
    row = tl.program_id(1) * M + tl.arange(0, M)
    live = row < R
    block = tl.load(pairs + run) if KIVI else run
    q_rows = block * R + row
    # From here on positions within the item, which fit 32 bits.
    k_words += first * (D * KB // 16)
    v_words += first * (D * VB // 16)
    k_scale += group * D if KIVI else first
    k_minimum += group * D
    GROUPS: tl.constexpr = (D + 31) // 32 if KIVI else 1
    v_scale += first * GROUPS
    v_minimum += first * GROUPS
    high, low, unit = read_query(query, q_rows, live, D, KT, KC, KH, KF, SPLIT, KIVI)
    if KIVI:
        start, shift = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    else:
        start = tl.load(shifts + q_rows * 2, mask=live, other=0.0)
        shift = tl.load(shifts + q_rows * 2 + 1, mask=live, other=0.0)
    scale = scaling if SOFTCAP else scaling * 1.4426950408889634
    unit *= scale
    maximum = tl.full([M], -float("inf"), tl.float32)
    S: tl.constexpr = 8 if KIVI else 16  # rows that sums are kept of: kivi has more of them, and few registers left
    total = tl.zeros([S, M], tl.float32)
    offsets = (tl.zeros([S, M], tl.float32),) * GROUPS
    acc = (tl.zeros([VC, M], tl.float32),) * (VH * VF)
    for t in tl.range(0, tokens, N):
        position = t + tl.arange(0, N)
        rows = tl.minimum(position, tokens - 1)  # rows beyond the end repeat the last token, with weight 0
        if KIVI:
            bases = read_groups(v_minimum, rows, GROUPS, G)  # early: the compiler does not copy them ahead of their use
            s = kivi_logits(k_words, k_scale, k_minimum, rows, t // 32, high, low, unit, D, M, KT, KC, KH, KF, KB, SPLIT, ASM)
        else:
            s = tl.broadcast_to(start[None, :], [N, M])
            s = rotated_logits(s, k_words, k_scale, rows, high, low, shift, scale, D, KT, KC, KH, KF, KB, ASM)
        if SOFTCAP:
            s = tanh(s / softcap) * (softcap * 1.4426950408889634)
        s = tl.where((position < tokens)[:, None], s, -float("inf"))  # [N, M], logits to base 2
        scales, minima, largest = read_scales(v_scale, bases if KIVI else rows, rows, N, GROUPS, G, KIVI, VB)
        # Weights are relative to the largest product of weight and scale, which fp16 then holds without overflow; up to a
        # power of two, so that a token that has all the weight loses nothing to rounding.
        new = tl.maximum(maximum, tl.max(s + exponent(largest)[:, None], 0) - HEADROOM)
        fade = tl.exp2(maximum - new)
        maximum = new
        p = tl.exp2(s - new[None, :])
        total = total * fade[None, :] + fold(p, N, M, S)
        faded = ()
        weights = ()
        for g in tl.static_range(GROUPS):
            weight = p * scales[g][:, None]
            offset = p * minima[g][:, None] if KIVI else weight
            faded = faded + (offsets[g] * fade[None, :] + fold(offset, N, M, S),)
            weights = weights + (weight.to(tl.float16),)
        offsets = faded
        acc = add_values(acc, v_words, rows, weights, fade, KIVI, D, VT, VC, VH, VF, VB, ASM)
    slot = tl.load(item + 4).to(tl.int64)  # read last, not to hold a register through the loop
    sums = tl.sum(total, 0)
    store_output(acc, offsets, sums, out + slot * R * D, row, live, KIVI, D, VT, VC, VH, VF)
    tl.store(lse + slot * R + row, (maximum + tl.log2(sums)) * LN2, mask=live)


@triton.jit
def read_scales(
    scale, bases, rows, N: tl.constexpr, GROUPS: tl.constexpr, G: tl.constexpr, KIVI: tl.constexpr, BITS: tl.constexpr
):
    """For each group of channels the value scale and (kivi) the value at code 2**(BITS - 1), fp32 [N]; and the largest scale.

    bases: kivi the values at code 0, from `read_groups`.
    """
    scales = ()
    minima = ()
    largest = tl.full([N], SMALLEST, tl.float32)
    if KIVI:
        numbers = columns(read_groups(scale, rows, GROUPS, G), N, G)
        bases = columns(bases, N, G)
    for g in tl.static_range(GROUPS):
        v_scale = numbers[g].to(tl.float32) if KIVI else tl.load(scale + rows).to(tl.float32)
        scales = scales + (v_scale,)
        if KIVI:
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
def add_values(
    acc,
    words,
    rows,
    weights,
    fade,
    KIVI: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    BITS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Faded accumulators plus V^T p^T, fp32 [C, M] for each tile; weights [N, M] for each group of channels."""
    added = ()
    for h in tl.static_range(H):
        x = h * C + tl.arange(0, C)
        w_low = read_words(words, rows, x, D, T, C, BITS, False, True)
        w_high = read_high(words, rows, x, D, T, C, BITS, True)
        for i in tl.static_range(F):
            u = codes(w_low, w_high, i, D, T, BITS, 2.0 ** (BITS - 1), ASM)
            o = acc[h * F + i] * fade[None, :]
            o = add_chunk(o, u, weights, i * T + x, i * T + h * C, i * T + (T if h == H - 1 else h * C + C), KIVI)
            added = added + (o,)
    return added


@triton.jit
def add_chunk(o, u, weights, channel, BEGIN: tl.constexpr, END: tl.constexpr, KIVI: tl.constexpr):
    """o plus u [C, N] of channels BEGIN to END times weights. These channels are in one group of 32, or in two."""
    FIRST: tl.constexpr = BEGIN // 32 if KIVI else 0
    LAST: tl.constexpr = (END - 1) // 32 if KIVI else 0
    if FIRST == LAST:
        return tl.dot(u, weights[FIRST], o)
    else:
        in_first = (channel < LAST * 32)[:, None]
        o = tl.dot(tl.where(in_first, u, 0.0), weights[FIRST], o)
        return tl.dot(tl.where(in_first, 0.0, u), weights[LAST], o)


@triton.jit
def store_output(
    acc,
    offsets,
    sums,
    out,
    row,
    live,
    KIVI: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
):
    for h in tl.static_range(H):
        x = h * C + tl.arange(0, C)
        for i in tl.static_range(F):
            offset = offset_of_chunk(offsets, i * T + x, i * T + h * C, i * T + (T if h == H - 1 else h * C + C), KIVI)
            # The levels of a rotated value are at the middle of its steps: half a step above code - 2**(bits - 1).
            o = (acc[h * F + i] + (offset if KIVI else offset * 0.5)) / sums[None, :]
            tl.store(out + row[None, :] * D + (i * T + x)[:, None], o, mask=(x < T)[:, None] & live[None, :])


@triton.jit
def offset_of_chunk(offsets, channel, BEGIN: tl.constexpr, END: tl.constexpr, KIVI: tl.constexpr):
    """The sum for the group of each channel: [1, M], or [C, M] if there are two."""
    FIRST: tl.constexpr = BEGIN // 32 if KIVI else 0
    LAST: tl.constexpr = (END - 1) // 32 if KIVI else 0
    offset = tl.sum(offsets[FIRST], 0)[None, :]
    if FIRST == LAST:
        return offset
    else:
        return tl.where((channel < LAST * 32)[:, None], offset, tl.sum(offsets[LAST], 0)[None, :])


@triton.jit
def fold(x, N: tl.constexpr, M: tl.constexpr, S: tl.constexpr):
    """Sum of every S-th row of x [N, M]: [S, M]. For S = 8 or 16 they are in the same thread, so it costs no exchange."""
    return tl.sum(tl.reshape(x, [N // S, S, M]), 0)


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * 2.885390081777927) + 1.0)
