"""The rotation of queries, and of the output back (see `rotated`): a block-Hadamard matrix made on the spot."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from ib_kernels.packed import Packed
from torch import Tensor

OPTIONS = {"num_warps": 8, "num_stages": 1}


def rotate_query(packed: Packed, query: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated query rows of every run of a rotated format, from query [pairs, R, D].

    Returns (fp32 [P, R, D], shifts fp32 [P, R, 2]). The first shift is what half a step adds to the product with codes
    minus 2**(bits - 1), whose levels are at their middle; the second is the product with the centre.
    """
    runs, rows = packed.lengths.shape[0], query.shape[1]
    rotated = torch.empty(runs, rows, packed.head_dim, dtype=torch.float32, device=query.device)
    shifts = torch.empty(runs, rows, 2, dtype=torch.float32, device=query.device)
    rotate_query_kernel[(runs, rows)](
        query, packed.pairs, packed.keys["centre"], rotated, shifts, rows, **constants(packed.head_dim), **OPTIONS
    )
    return rotated, shifts


@cache
def constants(head_dim: int) -> dict[str, int]:
    """Arguments of a kernel that rotates: the head dimension, its padding, and the size of a block."""
    return {"D": head_dim, "DP": triton.next_power_of_2(head_dim), "BLOCK": head_dim & -head_dim}


@triton.jit(do_not_specialize=["R"])
def rotate_query_kernel(query, pairs, centre, rotated, shifts, R, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr):
    run, r = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, DP)
    q = tl.load(query + (tl.load(pairs + run) * R + r).to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
    c = tl.load(centre + run * D + d, mask=d < D, other=0.0).to(tl.float32)
    turned = rotate(q, DP, BLOCK)
    to = (run * R + r).to(tl.int64)
    tl.store(rotated + to * D + d, turned, mask=d < D)
    tl.store(shifts + to * 2, 0.5 * tl.sum(turned, 0))
    tl.store(shifts + to * 2 + 1, tl.sum(q * c, 0))


@triton.jit
def rotate(x, DP: tl.constexpr, BLOCK: tl.constexpr):
    """x [DP] times the orthonormal block-Hadamard matrix with blocks of BLOCK <= 256.

    The matrix of a block is a Kronecker product, so a block is a square of HIGH x LOW numbers whose sides are rotated in turn.
    """
    LOW: tl.constexpr = 16 if BLOCK > 16 else BLOCK
    HIGH: tl.constexpr = BLOCK // LOW
    square = tl.reshape(x, [DP // BLOCK, HIGH, LOW])
    square = tl.sum(square[:, :, :, None] * signs(LOW)[None, None, :, :], 2)
    square = tl.sum(square[:, :, None, :] * signs(HIGH)[None, :, :, None], 1)
    return tl.reshape(square, [DP]) * (1.0 / tl.sqrt(1.0 * BLOCK))


@triton.jit
def signs(SIZE: tl.constexpr):
    """Hadamard matrix [SIZE, SIZE] for SIZE <= 16: the sign is the parity of the bits that row and column share."""
    ones = tl.arange(0, SIZE)[:, None] & tl.arange(0, SIZE)[None, :]
    ones ^= ones >> 2
    ones ^= ones >> 1
    return 1.0 - 2.0 * (ones & 1).to(tl.float32)
