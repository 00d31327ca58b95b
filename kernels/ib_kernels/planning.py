"""Work items of one attention step: equal shares of the packed tokens, so that skewed lengths keep every core busy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ib_kernels import ragged
from ib_kernels.backends import check_kernel
from ib_kernels.kivi import GROUP_TOKENS, group_counts
from ib_kernels.packed import Packed
from ib_kernels.quantizer import RAW_BITS
from torch import Tensor

ITEM_TOKENS = 128  # an item of fewer tokens would cost more to merge than to read
RAW_ITEMS_PER_CORE = 3  # programs of four warps that a GPU core holds, for tokens at 16 bits
FIELDS = 5  # of an item: first row, tokens, first group of keys, run, slot


@dataclass(frozen=True)
class Plan:
    """What every program of a step reads, and where it writes. Valid until the lengths change.

    Attributes:
        items: for each part int32 [W, 5]: first row, tokens (0 for an item without work), first group of keys, run, and the
            slot of the partial result. W depends on the number of runs, not on their lengths, so a step can be captured
            in a CUDA graph.
        slots: int32 [pairs + 1], first slot of each pair: the window's partial result, then those of its items.
        rotated: uint8 [slots], 1 where the output of a slot is still rotated.
        any_rotated: whether any is.
    """

    items: tuple[Tensor, ...]
    slots: Tensor
    rotated: Tensor
    any_rotated: bool


@torch.no_grad()
def plan(
    parts: Sequence[Packed],
    pairs: int,
    device: torch.device,
    items: int | None = None,
    *,
    rows: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    softcap: bool = False,
) -> Plan:
    """Cut the runs of `parts` into about `items` pieces a part, by default what fills the GPU.

    The pieces of a run have whole groups of 32 tokens and differ by one group at most. Nothing is read back from the GPU.
    A few more pieces than programs that run at a time would take as long as twice as many, so there are at most `items` of
    them, if there are fewer runs than half of that.

    Args:
        parts: packed tokens of the same batch; a pair may appear in several, and several times in one.
        pairs: number of (sequence, KV head) pairs of the batch.
        device: where the parts are.
        items: pieces to aim at in every part. By default what a GPU runs at once.
        rows, dtype, softcap: what the GPU should be full with: rows of a pair's query, their dtype, and whether logits are
            capped. The plan is right for other queries, too.

    Raises ValueError if there is no kernel for a part.
    """
    for part in parts:
        check_kernel(part.head_dim, part.format, part.key_bits, part.value_bits)
    aims = [_items_that_fill(part, rows, dtype, softcap) if items is None else items for part in parts]
    sizes = [_piece_tokens(part.lengths, aim) for part, aim in zip(parts, aims)]
    counts = [-(-part.lengths.long() // size) for part, size in zip(parts, sizes)]
    none = torch.zeros(0, dtype=torch.int64, device=device)
    first_slots, slots = _slots(torch.cat([none, *(part.pairs.long() for part in parts)]), torch.cat([none, *counts]), pairs)
    runs = [part.lengths.shape[0] for part in parts]
    tables = tuple(
        _items(part.lengths.long(), size, count, first, aim + part.lengths.shape[0])
        for part, size, count, first, aim in zip(parts, sizes, counts, first_slots.split(runs), aims)
    )
    nowhere = pairs + sum(table.shape[0] for table in tables)  # the slot of items without work
    rotated = torch.zeros(nowhere + 1, dtype=torch.uint8, device=device)
    for part, table in zip(parts, tables):
        if is_rotated(part):
            rotated.index_fill_(0, torch.where(table[:, 1] > 0, table[:, 4], nowhere).long(), 1)
    return Plan(tables, slots, rotated[:nowhere], any(is_rotated(part) for part in parts))


def is_rotated(part: Packed) -> bool:
    """Whether attention to this part takes rotated queries and gives a rotated output."""
    return part.format == "rotated" and part.key_bits != RAW_BITS


def _items_that_fill(part: Packed, rows: int, dtype: torch.dtype, softcap: bool) -> int:
    """As many as the GPU runs at a time, which its registers and shared memory limit."""
    device = part.lengths.device
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return 4  # under the interpreter; any number would do
    from ib_kernels.decoding_triton import programs_per_core

    per_core = RAW_ITEMS_PER_CORE
    if part.key_bits != RAW_BITS:
        per_core = programs_per_core(part.format, part.head_dim, part.key_bits, part.value_bits, rows, dtype, softcap, device)
    return per_core * torch.cuda.get_device_properties(device).multi_processor_count


def _piece_tokens(lengths: Tensor, items: int) -> Tensor:
    """Tokens of the pieces of each run, whole groups: int64 [P]. All runs together give at most max(items, items / 2 + P)."""
    whole = max(1, items - min(items // 2, lengths.shape[0]))  # a run has up to one piece more than its share of these
    most = _whole_groups(-(-lengths.sum() // whole)).clamp(min=ITEM_TOKENS)
    pieces = (-(-lengths.long() // most)).clamp(min=1)  # [P]
    return _whole_groups(-(-lengths.long() // pieces)).clamp(min=GROUP_TOKENS)


def _whole_groups(tokens: Tensor) -> Tensor:
    return -(-tokens // GROUP_TOKENS) * GROUP_TOKENS


def _slots(pairs: Tensor, counts: Tensor, pair_count: int) -> tuple[Tensor, Tensor]:
    """First slot of every run int64 [runs], and of every pair int32 [pairs + 1], the window's slot included."""
    order = pairs.argsort(stable=True)
    before = ragged.starts(counts[order])  # slots of the runs in front
    first = torch.empty_like(counts)
    first[order] = before + pairs[order] + 1  # and one of the window for this pair and each in front
    of_pair = counts.new_zeros(pair_count + 1).index_add(0, pairs + 1, counts)
    slots = of_pair.cumsum(0) + torch.arange(pair_count + 1, device=counts.device)
    return first, slots.to(torch.int32)


def _items(lengths: Tensor, size: Tensor, counts: Tensor, first_slot: Tensor, width: int) -> Tensor:
    if lengths.shape[0] == 0:
        return torch.zeros(width, FIELDS, dtype=torch.int32, device=lengths.device)
    item = torch.arange(width, device=lengths.device)
    run = torch.searchsorted(counts.cumsum(0), item, right=True).clamp(max=lengths.shape[0] - 1)
    piece = item - ragged.starts(counts)[run]
    begin = piece * size[run]
    tokens = torch.where(item < counts.sum(), torch.minimum(size[run], lengths[run] - begin), 0)
    row = ragged.starts(lengths)[run] + begin
    group = ragged.starts(group_counts(lengths))[run] + begin // GROUP_TOKENS
    return torch.stack([row, tokens, group, run, first_slot[run] + piece], dim=1).to(torch.int32)
