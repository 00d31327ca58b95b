"""The rotation of queries, and of the output back (see `reference`): a block-diagonal Hadamard matrix made on the spot."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from ib_kernels.formats.rotated.reference import hadamard_order
from torch import Tensor

LAUNCH = {"num_warps": 8, "num_stages": 1}


def rotate_query(centre: Tensor, pairs: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated query rows of every run, from query [pairs, R, D], the centres fp16 [P, D] of its keys and its pair int32 [P].

    Returns (fp32 [P, R, D], shifts fp32 [P, R, 2]). The first shift is what half a step adds to the product with codes
    minus 2**(bits - 1), whose levels are at their middle; the second is the product with the centre.
    """
    runs, (_, rows, head_dim) = pairs.shape[0], query.shape
    rotated = torch.empty(runs, rows, head_dim, dtype=torch.float32, device=query.device)
    shifts = torch.empty(runs, rows, 2, dtype=torch.float32, device=query.device)
    rotate_query_kernel[(runs, rows)](query, pairs, centre, rotated, shifts, rows, **constants(head_dim), **LAUNCH)
    return rotated, shifts


@cache
def constants(head_dim: int) -> dict[str, int]:
    """Arguments of a kernel that rotates: the head dimension, its padding, and the order of the Hadamard matrix."""
    return {"D": head_dim, "DP": triton.next_power_of_2(head_dim), "ORDER": hadamard_order(head_dim)}


@triton.jit(do_not_specialize=["R"])
def rotate_query_kernel(query, pairs, centre, rotated, shifts, R, D: tl.constexpr, DP: tl.constexpr, ORDER: tl.constexpr):
    """One query row, rotated for one run, and its two shifts.

    query: [pairs, R, D]
    pairs: int32 [P]
    centre: fp16 [P, D]
    rotated, shifts: fp32 [P, R, D], [P, R, 2]
    DP, ORDER: D padded to a power of two, and the order of the Hadamard matrix
    """
    run, r = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, DP)
    q = tl.load(query + (tl.load(pairs + run) * R + r).to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)  # [DP]
    c = tl.load(centre + run * D + d, mask=d < D, other=0.0).to(tl.float32)  # [DP]
    turned = rotate(q, DP, ORDER)
    to = (run * R + r).to(tl.int64)
    tl.store(rotated + to * D + d, turned, mask=d < D)
    tl.store(shifts + to * 2, 0.5 * tl.sum(turned, 0))
    tl.store(shifts + to * 2 + 1, tl.sum(q * c, 0))


@triton.jit
def rotate(x, DP: tl.constexpr, ORDER: tl.constexpr):
    """x [DP] times the orthonormal block-diagonal Hadamard matrix with blocks of ORDER <= 256.

    The matrix of a block is a Kronecker product, so a block is a square of HIGH x LOW numbers whose sides are rotated in turn.
    """
    LOW: tl.constexpr = 16 if ORDER > 16 else ORDER
    HIGH: tl.constexpr = ORDER // LOW
    square = tl.reshape(x, [DP // ORDER, HIGH, LOW])
    square = tl.sum(square[:, :, :, None] * signs(LOW)[None, None, :, :], 2)
    square = tl.sum(square[:, :, None, :] * signs(HIGH)[None, :, :, None], 1)
    return tl.reshape(square, [DP]) * (1.0 / tl.sqrt(1.0 * ORDER))


@triton.jit
def signs(SIZE: tl.constexpr):
    """Hadamard matrix [SIZE, SIZE] for SIZE <= 16: the sign is the parity of the bits that row and column share."""
    ones = tl.arange(0, SIZE)[:, None] & tl.arange(0, SIZE)[None, :]
    ones ^= ones >> 2
    ones ^= ones >> 1
    return 1.0 - 2.0 * (ones & 1).to(tl.float32)
