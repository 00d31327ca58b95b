"""Merge of the partial results of a step by their log-sum-exp."""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl
from ib_kernels.formats.rotated.rotation import constants, rotate
from ib_kernels.scheduling import Schedule
from torch import Tensor

SLOTS = 32  # that a program merges at a time


def merge_slots(
    schedule: Schedule, partial: Tensor, partial_lse: Tensor, bias: Tensor | None, window: bool, out: Tensor, lse: Tensor
) -> None:
    """Merge the slots of each pair.

    Args:
        schedule: which slots belong to which pair, and which of them hold a rotated output.
        partial, partial_lse: fp32 [slots, R, D] and [slots, R].
        bias: fp32 [pairs, R], added to the log-sum-exp of all slots but the window's; or None.
        window: whether the first slot of each pair is in use.
        out, lse: fp32 [pairs, R, D] and [pairs, R]; a row that sees nothing gets 0 and -inf.
    """
    pairs, rows, head_dim = out.shape
    selected, launch = variant(head_dim, bias is not None, window, schedule.any_rotated)
    merge_kernel[(pairs, rows)](
        schedule.slots,
        schedule.rotated,
        partial,
        partial_lse,
        partial_lse if bias is None else bias,
        out,
        lse,
        rows,
        **selected,
        **launch,
    )


@cache
def variant(head_dim: int, bias: bool, window: bool, rotated: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants that select one compiled variant of `merge_kernel`, and how to launch it."""
    flags = {"BIAS": bias, "WINDOW": window, "ROTATED": rotated, "S": SLOTS}
    return constants(head_dim) | flags, {"num_warps": max(4, triton.next_power_of_2(head_dim) // 32), "num_stages": 1}


@triton.jit(do_not_specialize=["R"])
def merge_kernel(
    slots,
    rotated,
    partial,
    partial_lse,
    bias,
    out,
    lse,
    R,
    D: tl.constexpr,
    DP: tl.constexpr,
    ORDER: tl.constexpr,
    BIAS: tl.constexpr,
    WINDOW: tl.constexpr,
    ROTATED: tl.constexpr,
    S: tl.constexpr,
):
    """One row of a pair's output and log-sum-exp: its slots, weighted by their log-sum-exps.

    slots: int32 [pairs + 1], first slot of each pair, which is the window's
    rotated: uint8 [slots], 1 where the output of a slot is to be rotated back
    partial, partial_lse: fp32 [slots, R, D], [slots, R]
    bias: fp32 [pairs, R] if BIAS, added to the log-sum-exp of all slots but the window's
    out, lse: fp32 [pairs, R, D], [pairs, R]
    DP, ORDER: D padded to a power of two, and the order of the Hadamard matrix
    S: slots of a pass of the loop
    """
    pair, r = tl.program_id(0), tl.program_id(1)
    window = tl.load(slots + pair)
    begin = window if WINDOW else window + 1
    end = tl.load(slots + pair + 1)
    shift = tl.load(bias + pair * R + r) if BIAS else 0.0
    d = tl.arange(0, DP)
    # Every S-th slot is merged on its own, and these S results at the end.
    maximum = tl.full([S], -float("inf"), tl.float32)
    total = tl.zeros([S], tl.float32)
    plain = tl.zeros([S, DP], tl.float32)
    turned = tl.zeros([S, DP], tl.float32)
    for first in range(begin, end, S):
        slot = first + tl.arange(0, S)
        inside = (slot < end)[:, None] & (d < D)[None, :]
        o = tl.load(partial + (slot.to(tl.int64) * R + r)[:, None] * D + d[None, :], mask=inside, other=0.0)  # [S, DP]
        x = slot_lse(partial_lse, slot, end, window, shift, R, r)  # [S]
        new = tl.maximum(maximum, x)  # [S]
        fade = tl.exp(maximum - finite(new))
        weight = tl.exp(x - finite(new))
        maximum = new
        total = total * fade + weight
        o = tl.where((weight > 0)[:, None], o, 0.0) * weight[:, None]  # what has no weight may hold anything
        if ROTATED:
            back = tl.load(rotated + slot, mask=slot < end, other=0) != 0  # [S]
            turned = turned * fade[:, None] + tl.where(back[:, None], o, 0.0)
            o = tl.where(back[:, None], 0.0, o)
        plain = plain * fade[:, None] + o
    top = tl.max(maximum, 0)
    scale = tl.exp(maximum - finite(top))
    merged = tl.sum(plain * scale[:, None], 0)  # [DP]
    if ROTATED:
        merged += rotate(tl.sum(turned * scale[:, None], 0), DP, ORDER)
    total = tl.sum(total * scale, 0)
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    row = (pair * R + r).to(tl.int64)
    tl.store(out + row * D + d, merged / total, mask=d < D)
    tl.store(lse + row, tl.where(sees, tl.log(total) + top, -float("inf")))


@triton.jit
def slot_lse(lse, slot, end, window, shift, R, r):
    """Log-sum-exp of row r in some slots, the bias added: [S], -inf from `end` on."""
    x = tl.load(lse + slot.to(tl.int64) * R + r, mask=slot < end, other=-float("inf"))
    return tl.where(slot > window, x + shift, x)


@triton.jit
def finite(maximum):
    """0 in place of the maximum of rows that see nothing: all their weights become 0, none NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)
