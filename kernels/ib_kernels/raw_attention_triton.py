"""Attention over tokens at full precision: tiers of 16 bits, and the window of recent tokens."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from ib_kernels.logits_triton import tanh
from torch import Tensor

LN2 = tl.constexpr(math.log(2))
ROWS = 8  # of a query that a program takes: with 16 its registers spill on all GPUs


def attend_raw(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pairs: Tensor,
    items: Tensor,
    out: Tensor,
    lse: Tensor,
    scaling: float,
    softcap: float | None,
    mask: Tensor | None = None,
    window: int = 0,
) -> None:
    """Fill slots with partial results.

    Args:
        query: [pairs, R, D].
        keys, values: [N, D] of P runs; or [pairs, window, D], contiguous.
        pairs: int32 [P], of the runs.
        items: int32 [W, 5] of a `Schedule`; for a window its `slots`, the first of which each pair fills.
        out, lse: fp32 [slots, R, D] and [slots, R].
        scaling, softcap: of the logits.
        mask: bool [B or 1, M, window], pair p belonging to sequence p // (pairs / B) and query row r to position r % M; or None.
        window: tokens of a window, 0 for items.
    """
    rows, head_dim = query.shape[1:]
    selected, launch = variant(head_dim, softcap is not None, window > 0, mask is not None)
    shared = mask is not None and mask.shape[0] == 1
    programs = query.shape[0] if window else items.shape[0]
    raw_kernel[(programs, -(-rows // selected["M"]))](
        query,
        keys,
        values,
        pairs,
        items,
        keys if mask is None else mask.view(torch.uint8),
        out,
        lse,
        scaling,
        1.0 if softcap is None else softcap,
        rows,
        window,
        1 if mask is None else mask.shape[1],
        0 if mask is None or shared else mask.shape[1] * mask.shape[2],
        1 if mask is None or shared else query.shape[0] // mask.shape[0],
        **selected,
        **launch,
    )


@cache
def variant(head_dim: int, softcap: bool, window: bool, mask: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants that select one compiled variant of `raw_kernel`, and how to launch it."""
    wide = head_dim > 128
    constants = {
        "D": head_dim,
        "DP": triton.next_power_of_2(head_dim),
        "M": ROWS,
        "N": 32 if wide else 64,  # tokens of one pass of the loop
        "SOFTCAP": softcap,
        "WINDOW": window,
        "MASK": mask,
    }
    return constants, {"num_warps": 8 if wide else 4, "num_stages": 2}


@triton.jit(do_not_specialize=["R", "window", "positions", "mask_stride"])
def raw_kernel(
    query,
    keys,
    values,
    pairs,
    items,
    mask,
    out,
    lse,
    scaling,
    softcap,
    R,
    window,
    positions,
    mask_stride,
    pairs_per_sequence,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
):
    """Softmax attention of M query rows to tokens at full precision: output and log-sum-exp, into one slot.

    query: [pairs, R, D]
    keys, values: [tokens, D]; if WINDOW [pairs * window, D], the same number for each pair
    pairs: int32 [P], of the runs
    items: int32 [W, 5], see `Schedule`; if WINDOW the first slot of each pair, int32 [pairs + 1]
    mask: uint8 [B or 1, positions, window] if MASK; mask_stride is 0 where one mask serves all sequences
    out, lse: fp32 [slots, R, D], [slots, R]
    scaling, softcap: of the logits
    DP: D padded to a power of two
    M, N: query rows of a program, and tokens of a pass of its loop
    """
    w = tl.program_id(0)
    if WINDOW:
        pair = w
        tokens = window
        first = w.to(tl.int64) * window
        slot = tl.load(items + w).to(tl.int64)
    else:
        tokens = tl.load(items + w * 5 + 1)
        if tokens == 0:
            return
        pair = tl.load(pairs + tl.load(items + w * 5 + 3))
        first = tl.load(items + w * 5).to(tl.int64)
        slot = tl.load(items + w * 5 + 4).to(tl.int64)
    row = tl.program_id(1) * M + tl.arange(0, M)
    live = row < R
    d = tl.arange(0, DP)
    inside = d < D
    q = tl.load(query + (pair * R + row).to(tl.int64)[None, :] * D + d[:, None], mask=live[None, :] & inside[:, None], other=0.0)
    q = q.to(tl.float32)  # [DP, M]
    scale = scaling if SOFTCAP else scaling * 1.4426950408889634
    maximum = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([DP, M], tl.float32)
    for t in tl.range(0, tokens, N):
        position = t + tl.arange(0, N)
        rows = first + tl.minimum(position, tokens - 1)
        k = tl.load(keys + rows[:, None] * D + d[None, :], mask=inside[None, :], other=0.0)  # [N, DP]
        v = tl.load(values + rows[None, :] * D + d[:, None], mask=inside[:, None], other=0.0)  # [DP, N]
        s = tl.dot(k.to(tl.float32), q, input_precision="tf32x3") * scale  # [N, M]
        if SOFTCAP:
            s = tanh(s / softcap) * (softcap * 1.4426950408889634)
        seen = (position < tokens)[:, None] & live[None, :]  # [N, M]
        if MASK:
            of_row = pair // pairs_per_sequence * mask_stride + row % positions * tokens
            seen &= tl.load(mask + of_row[None, :] + position[:, None], mask=seen, other=0) != 0
        s = tl.where(seen, s, -float("inf"))
        new = tl.maximum(maximum, tl.max(s, 0))  # [M]
        finite = tl.where(new == -float("inf"), 0.0, new)  # rows that have seen nothing yet
        fade = tl.exp2(maximum - finite)
        p = tl.exp2(s - finite[None, :])  # [N, M]
        total = total * fade + tl.sum(p, 0)
        acc = tl.dot(v.to(tl.float32), p, acc * fade[None, :], input_precision="tf32x3")
        maximum = new
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    o = acc / total[None, :]  # [DP, M]
    tl.store(out + slot * R * D + row[None, :] * D + d[:, None], o, mask=live[None, :] & inside[:, None])
    tl.store(lse + slot * R + row, tl.where(sees, (maximum + tl.log2(total)) * LN2, -float("inf")), mask=live)
