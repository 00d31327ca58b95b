"""Merge of the partial results of a step by their log-sum-exp."""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl
from ib_kernels.planning import Plan
from ib_kernels.rotation_triton import constants, rotate
from torch import Tensor

SLOTS = 32  # that a program merges at a time


def merge_slots(
    plan: Plan, partial: Tensor, partial_lse: Tensor, bias: Tensor | None, window: bool, out: Tensor, lse: Tensor
) -> None:
    """Merge the slots of each pair.

    Args:
        plan: which slots belong to which pair, and which of them hold a rotated output.
        partial, partial_lse: fp32 [slots, R, D] and [slots, R].
        bias: fp32 [pairs, R], added to the log-sum-exp of all slots but the window's; or None.
        window: whether the first slot of each pair is in use.
        out, lse: fp32 [pairs, R, D] and [pairs, R]; a row that sees nothing gets 0 and -inf.
    """
    pairs, rows, head_dim = out.shape
    selected, options = variant(head_dim, bias is not None, window, plan.any_rotated)
    merge_kernel[(pairs, rows)](
        plan.slots,
        plan.rotated,
        partial,
        partial_lse,
        partial_lse if bias is None else bias,
        out,
        lse,
        rows,
        **selected,
        **options,
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
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    WINDOW: tl.constexpr,
    ROTATED: tl.constexpr,
    S: tl.constexpr,
):
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
        o = tl.load(partial + (slot.to(tl.int64) * R + r)[:, None] * D + d[None, :], mask=inside, other=0.0)
        x = slot_lse(partial_lse, slot, end, window, shift, R, r)
        new = tl.maximum(maximum, x)
        fade = tl.exp(maximum - finite(new))
        weight = tl.exp(x - finite(new))
        maximum = new
        total = total * fade + weight
        o = tl.where((weight > 0)[:, None], o, 0.0) * weight[:, None]  # what has no weight may hold anything
        if ROTATED:
            back = tl.load(rotated + slot, mask=slot < end, other=0) != 0
            turned = turned * fade[:, None] + tl.where(back[:, None], o, 0.0)
            o = tl.where(back[:, None], 0.0, o)
        plain = plain * fade[:, None] + o
    top = tl.max(maximum, 0)
    scale = tl.exp(maximum - finite(top))
    merged = tl.sum(plain * scale[:, None], 0)
    if ROTATED:
        merged += rotate(tl.sum(turned * scale[:, None], 0), DP, BLOCK)
    total = tl.sum(total * scale, 0)
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    row = (pair * R + r).to(tl.int64)
    tl.store(out + row * D + d, merged / total, mask=d < D)
    tl.store(lse + row, tl.where(sees, tl.log(total) + top, -float("inf")))


@triton.jit
def slot_lse(lse, slot, end, window, shift, R, r):
    x = tl.load(lse + slot.to(tl.int64) * R + r, mask=slot < end, other=-float("inf"))
    return tl.where(slot > window, x + shift, x)


@triton.jit
def finite(maximum):
    """0 in place of the maximum of rows that see nothing: all their weights become 0, none NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)
