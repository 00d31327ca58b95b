"""One setting for all heads: the grid of tokens and bits of the source paper (arXiv 2412.12706), and its two edges."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ib_analysis.formats.packed import tokens_nbytes
from ib_analysis.options import FULL, precisions
from ib_analysis.plan import HeadPlan, Pinned, Plans, Tier, excess_bytes
from ib_analysis.shape import CacheShape


def uniform_grid(shape: CacheShape, pinned: Pinned, context_length: int, share: float) -> list[Plans]:
    """For every format, key and value precision, the cell with the most tokens within a share from a context length on."""
    cells = [_largest_cell(shape, pinned, context_length, share, fmt, bits) for fmt, bits in precisions()]
    return [cell for cell in cells if cell is not None]


def prune_only(shape: CacheShape, pinned: Pinned, context_length: int, share: float) -> list[Plans]:
    """As many tokens as fit, at 16 bits."""
    fmt = precisions()[-1][0]
    cell = _largest_cell(shape, pinned, context_length, share, fmt, FULL)
    return [] if cell is None else [cell]


def quantize_only(shape: CacheShape, pinned: Pinned, context_length: int, share: float) -> list[Plans]:
    """All tokens, at every precision that fits; none fits a small budget."""
    cells = uniform_grid(shape, pinned, context_length, share)
    return [cell for cell in cells if all(plan.kept_share == 1 for row in cell if row for plan in row)]


def _largest_cell(
    shape: CacheShape, pinned: Pinned, context_length: int, share: float, fmt: str, bits: tuple[int, int]
) -> Plans | None:
    """The cell that keeps the most of the compressible tokens, None if not even one token fits."""
    tokens = pinned.compressible(context_length)
    pinned_bytes = sum(pinned.nbytes(context_length, shape.layers[i]) for i in shape.compressible)
    spare = int(share * shape.bytes_per_token * context_length) - pinned_bytes
    counts = np.arange(1, tokens + 1)
    alike = Counter(shape.layers[i].head_dim for i, _ in shape.heads)
    nbytes = np.sum([heads * tokens_nbytes(fmt, counts, dim, *bits) for dim, heads in alike.items()], axis=0)
    for count in counts[nbytes <= spare][::-1].tolist():
        plan = HeadPlan(fmt, (Tier(count / tokens, *bits),))
        cell = tuple(None if layer.sliding_window else (plan,) * layer.kv_heads for layer in shape.layers)
        if excess_bytes(shape, cell, pinned, share, context_length) == 0:
            return cell
    return None
