"""Work items of one attention step: equal shares of the packed tokens, so that skewed lengths keep every core busy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ib_kernels import ragged
from ib_kernels.backends import check_kernel
from ib_kernels.formats import get_kernels
from ib_kernels.formats.format import RAW_BITS, row_count
from ib_kernels.launch_table import MAX_NARROW_ROWS, Asked
from ib_kernels.packed import Packed
from torch import Tensor

BLOCK_TOKENS = 32  # that attention reads at a time, and that share a key scale where keys are grouped
MIN_ITEM_TOKENS = 128  # an item of fewer tokens would cost more to merge than to read
RAW_ITEMS_PER_CORE = 3  # programs of four warps that a GPU core holds, for tokens at 16 bits
FIELDS = 5  # of an item: first row, tokens, first block, run, slot


@dataclass(frozen=True)
class Schedule:
    """What every program of a step reads, and where it writes. Valid until the lengths change.

    Attributes:
        items: for each part int32 [W, 5]: first row, tokens (0 for an item without work), first block of the part, run, and the
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
def schedule(
    parts: Sequence[Packed],
    pairs: int,
    device: torch.device,
    items: int | None = None,
    *,
    rows: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    softcap: bool = False,
) -> Schedule:
    """Cut the runs of `parts` into about `items` items a part, by default what fills the GPU.

    The items of a run have whole blocks of 32 tokens and differ by one block at most. Nothing is read back from the GPU.
    A few more items than programs that run at a time would take as long as twice as many, so there are at most `items` of
    them, if there are fewer runs than half of that.

    Args:
        parts: packed tokens of the same batch; a pair may appear in several, and several times in one.
        pairs: number of (sequence, KV head) pairs of the batch.
        device: where the parts are.
        items: how many to aim at in every part. By default what a GPU runs at once.
        rows, dtype, softcap: what the GPU should be full with: rows of a pair's query, their dtype, and whether logits are
            capped. The schedule is right for other queries, too.

    Raises ValueError if there is no kernel for a part.
    """
    for part in parts:
        check_kernel(part.head_dim, *part.form)
    aims = [_items_that_fill(part, rows, dtype, softcap) if items is None else items for part in parts]
    sizes = [_item_tokens(part.lengths, aim) for part, aim in zip(parts, aims)]
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
        if rotates(part):
            rotated.index_fill_(0, torch.where(table[:, 1] > 0, table[:, 4], nowhere).long(), 1)
    return Schedule(tables, slots, rotated[:nowhere], any(rotates(part) for part in parts))


def rotates(part: Packed) -> bool:
    """Whether attention to this part takes rotated queries and gives a rotated output."""
    return part.key_bits != RAW_BITS and get_kernels(part.format).rotates


def _items_that_fill(part: Packed, rows: int, dtype: torch.dtype, softcap: bool) -> int:
    """As many as the GPU runs at a time, which its registers and shared memory limit."""
    device = part.lengths.device
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return 4  # under the interpreter; any number would do
    from ib_kernels.decoding_triton import capability, programs_per_core

    per_core = RAW_ITEMS_PER_CORE
    if part.key_bits != RAW_BITS:
        kernels, precision = get_kernels(part.format), (part.head_dim, part.key_bits, part.value_bits)
        query = torch.float32 if kernels.rotates else dtype
        many_rows, fp32 = rows > MAX_NARROW_ROWS, query == torch.float32
        asked = Asked(kernels.scales, *precision, many_rows, fp32, softcap, capability(part.lengths))
        per_core = programs_per_core(asked, query, device)
    return per_core * torch.cuda.get_device_properties(device).multi_processor_count


def _item_tokens(lengths: Tensor, items: int) -> Tensor:
    """Tokens of the items of each run, whole blocks: int64 [P]. All runs together give at most max(items, items / 2 + P)."""
    whole = max(1, items - min(items // 2, lengths.shape[0]))  # a run has up to one item more than its share of these
    max_tokens = _whole_blocks(-(-lengths.sum() // whole)).clamp(min=MIN_ITEM_TOKENS)
    counts = (-(-lengths.long() // max_tokens)).clamp(min=1)  # [P]
    return _whole_blocks(-(-lengths.long() // counts)).clamp(min=BLOCK_TOKENS)


def _whole_blocks(tokens: Tensor) -> Tensor:
    return row_count(BLOCK_TOKENS, tokens) * BLOCK_TOKENS


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
    of_run = item - ragged.starts(counts)[run]
    begin = of_run * size[run]
    tokens = torch.where(item < counts.sum(), torch.minimum(size[run], lengths[run] - begin), 0)
    row = ragged.starts(lengths)[run] + begin
    block = ragged.starts(row_count(BLOCK_TOKENS, lengths))[run] + begin // BLOCK_TOKENS
    return torch.stack([row, tokens, block, run, first_slot[run] + of_run], dim=1).to(torch.int32)
