"""What both quantizers share: which tokens a program takes, where they lie, and division that rounds as on a CPU."""

# ruff: noqa: RET505 - the compiler wants an else where a constant decides

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FP16_MAX = tl.constexpr(65504.0)


def blocks(lengths: Tensor, size: int, counts: list[int]) -> Tensor:
    """First row, tokens and run of every block of `size` tokens, the last of a run shorter: int32 [blocks, 3].

    `counts` are the lengths, known here.
    """
    return _blocks(lengths, size, sum(-(-n // size) for n in counts))


def max_blocks(lengths: Tensor, size: int, tokens: int) -> Tensor:
    """The same if only the sum of the lengths is known: as many as there may be, those that there are not with 0 tokens."""
    return _blocks(lengths, size, min(tokens, tokens // size + lengths.shape[0]))


def _blocks(lengths: Tensor, size: int, count: int) -> Tensor:
    table = torch.zeros(count, 3, dtype=torch.int32, device=lengths.device)
    if count:
        blocks_kernel[(lengths.shape[0],)](lengths.contiguous(), table, size, num_warps=4)
    return table


def source(x: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Arguments of `addresses` for x [B, heads, T, D]: heads, T and the strides."""
    return x.shape[1], x.shape[2], x.stride()[:3]


def fused() -> bool:
    """Whether a multiply-add rounds once. Under Triton's interpreter it rounds twice."""
    return os.environ.get("TRITON_INTERPRET") != "1"


def empty(dtype: torch.dtype, like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def constants(head_dim: int, bits: int) -> dict[str, Any]:
    """Arguments that select one compiled variant of a kernel that quantizes or unpacks."""
    return {"D": head_dim, "BITS": bits, "FUSED": fused()}


@triton.jit(do_not_specialize=["size"])
def blocks_kernel(lengths, blocks, size):
    """Write the blocks of a run. Each program adds up the lengths of the runs before its own: that takes one launch.

    lengths: int32 [P]
    blocks: int32 [count, 3]: first row, tokens and run
    size: tokens of a block
    """
    run = tl.program_id(0)
    row, block = 0, 0
    for begin in range(0, run, 512):
        at = begin + tl.arange(0, 512)
        length = tl.load(lengths + at, mask=at < run, other=0)  # [512]
        row += tl.sum(length)
        block += tl.sum(tl.cdiv(length, size))
    tokens = tl.load(lengths + run)
    count = tl.cdiv(tokens, size)
    for begin in range(0, count, 128):
        at = begin + tl.arange(0, 128)
        to = blocks + (block + at).to(tl.int64) * 3
        tl.store(to, row + at * size, mask=at < count)
        tl.store(to + 1, tl.minimum(tokens - at * size, size), mask=at < count)
        tl.store(to + 2, tl.zeros([128], tl.int32) + run, mask=at < count)


@triton.jit
def addresses(x, rows, at, heads, length, strides):
    """Where the rows rows[at] [N] of x [B, heads, length, D] begin, all of one head; strides of batch, heads and tokens."""
    row = tl.load(rows + at).to(tl.int32)  # [N]
    pair = tl.load(rows).to(tl.int32) // length
    head = (pair // heads).to(tl.int64) * strides[0] + (pair % heads).to(tl.int64) * strides[1]
    return x + head + (row - pair * length).to(tl.int64) * strides[2]


@triton.jit
def widened(x):
    """x in fp32. A bf16 number is the upper half of its float."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def in_range(x):
    """x in fp32, within the fp16 range; NaN stays NaN."""
    x = tl.maximum(widened(x), -FP16_MAX, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, FP16_MAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def divide(x, divisor, FUSED: tl.constexpr):
    """x [...] / divisor [..., 1 allowed], rounded to the nearest float.

    One reciprocal per divisor, and for each element its product with it, corrected by the remainder, which a fused
    multiply-add gives exactly (Markstein 1990). The result is the correctly rounded quotient if the divisor has eleven bits,
    as an fp16 scale has.
    """
    if FUSED:
        inverse = tl.broadcast_to(reciprocal(divisor, FUSED), x.shape)
        quotient = x * inverse
        return tl.fma(tl.fma(quotient, tl.broadcast_to(-divisor, x.shape), x), inverse, quotient)
    else:
        return tl.div_rn(x, tl.broadcast_to(divisor, x.shape))


@triton.jit
def reciprocal(x, FUSED: tl.constexpr):
    """1 / x, rounded to the nearest float for the divisors of `divide`: from all floats that are up to four from it, and the
    approximation is up to two, one step of Newton's leads there.
    """
    if FUSED:
        guess = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        return tl.fma(guess, tl.fma(-x, guess, 1.0), guess)
    else:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)
