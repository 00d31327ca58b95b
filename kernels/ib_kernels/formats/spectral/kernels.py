"""The spectral format on a GPU: values as rotated, queries turned into the bases of keys. Keys are packed in plain torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ib_kernels.bases import Bases
from ib_kernels.formats.format import Side
from ib_kernels.formats.rotated.kernels import pack, unpack
from ib_kernels.formats.spectral.logits import SHIFTS
from torch import Tensor

__all__ = ["pack", "queries", "unpack"]


def queries(keys: Side, pairs: Tensor, query: Tensor, bases: Bases | None) -> tuple[Tensor, Tensor]:
    """Query rows in the coordinates of every run's keys, from query [pairs, R, D] and the pair int32 [P] of each run.

    Returns (fp32 [P, R, D], shifts fp32 [P, R, 5]). The first four shifts are what half a step of each quarter adds to the
    product with codes minus half of their number, whose levels are at their middle; the last is the product with the centre.
    """
    runs, (_, rows, head_dim) = pairs.shape[0], query.shape
    turned = torch.empty(runs, rows, head_dim, dtype=torch.float32, device=query.device)
    shifts = torch.empty(runs, rows, SHIFTS, dtype=torch.float32, device=query.device)
    matrices = query if bases is None else bases.back  # without bases any tensor serves
    selected, launch = query_variant(head_dim, bases is not None)
    if runs:
        turn_query_kernel[(runs, rows)](
            query,
            pairs,
            matrices,
            keys["centre"],
            turned,
            shifts,
            rows,
            matrices.shape[0],
            matrices.stride(),
            **selected,
            **launch,
        )
    return turned, shifts


def query_variant(head_dim: int, turns: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of `turn_query_kernel`, and how to launch it: a thread holds 16 numbers of a quarter of a matrix."""
    padded, quarter = triton.next_power_of_2(head_dim), triton.next_power_of_2(head_dim // 4)
    warps = min(16, max(1, padded * quarter // 512))
    return {"D": head_dim, "DP": padded, "QP": quarter, "TURNS": turns}, {"num_warps": warps, "num_stages": 1}


@triton.jit(do_not_specialize=["R", "heads"])
def turn_query_kernel(
    query,
    pairs,
    matrices,
    centre,
    turned,
    shifts,
    R,
    heads,
    strides,
    D: tl.constexpr,
    DP: tl.constexpr,
    QP: tl.constexpr,
    TURNS: tl.constexpr,
):
    """One query row in the coordinates of one run's keys, and its five shifts.

    query: [pairs, R, D]
    pairs: int32 [P]
    matrices: fp32 [heads, D, D], from the coordinates of keys back to keys, if TURNS; and its strides
    centre: fp16 [P, D]
    turned, shifts: fp32 [P, R, D], [P, R, 5]
    DP, QP: D and D / 4 padded to powers of two
    """
    T: tl.constexpr = D // 4
    run, r = tl.program_id(0), tl.program_id(1)
    pair = tl.load(pairs + run)
    rows = query + (pair * R + r).to(tl.int64) * D
    matrix = matrices + (pair % heads).to(tl.int64) * strides[0]
    d, j = tl.arange(0, DP), tl.arange(0, QP)
    q = tl.load(rows + d, mask=d < D, other=0.0).to(tl.float32)  # [DP]
    to = (run * R + r).to(tl.int64)
    shift = 0.0
    for i in tl.static_range(4):
        channel = i * T + j
        inside = j < T
        if TURNS:  # q . (x B) = (q B^T) . x
            some = tl.load(
                matrix + channel[:, None] * strides[1] + d[None, :] * strides[2],
                mask=inside[:, None] & (d < D)[None, :],
                other=0.0,
            )
            x = tl.sum(some * q[None, :], 1)  # [QP]
        else:
            x = tl.load(rows + channel, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(centre + run * D + channel, mask=inside, other=0.0).to(tl.float32)  # [QP]
        shift += tl.sum(x * c, 0)
        tl.store(turned + to * D + channel, x, mask=inside)
        tl.store(shifts + to * 5 + i, 0.5 * tl.sum(x, 0))
    tl.store(shifts + to * 5 + 4, shift)
