"""One setting for all heads: the grid of tokens and bits of the source paper (arXiv 2412.12706)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from ib_kernels import tokens_nbytes

from ib_analysis.cache.plan import FULL, HeadPlan, Plans, Tier, precisions
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.policies.policy import Cell


def uniform(spec: CacheSpec, limit: ByteLimit) -> Iterator[Cell]:
    """For every format, key and value precision, the cell with the most tokens."""
    for fmt, bits in precisions(spec.formats):
        yield from largest_cell(spec, limit, fmt, bits)


def largest_cell(spec: CacheSpec, limit: ByteLimit, fmt: str, bits: tuple[int, int]) -> Iterator[Cell]:
    """The cell that keeps the most of the compressible tokens; nothing if not even one token fits."""
    tokens = spec.recent.compressible(limit.context_length)
    counts = np.arange(1, tokens + 1)
    alike = Counter(spec.shape.layers[i].head_dim for i, _ in spec.shape.heads)
    nbytes = np.sum([heads * tokens_nbytes(fmt, counts, dim, *bits) for dim, heads in alike.items()], axis=0)
    for count in counts[nbytes <= limit.spare][::-1].tolist():
        plans = spec.uniform(HeadPlan(fmt, (Tier(count / tokens, *bits),)))
        if limit.excess(plans) == 0:
            yield _labelled(plans, count / tokens, fmt, bits)
            return


def _labelled(plans: Plans, share: float, fmt: str, bits: tuple[int, int]) -> Cell:
    if bits == FULL:
        return Cell(plans, "prune-only", f"{share:.1%} of tokens at 16 bits")
    family = "quantize-only" if share == 1 else "quantized pruning"
    return Cell(plans, family, f"{share:.1%} of tokens, {fmt}, keys {bits[0]} values {bits[1]} bits")
