"""Eviction alone: as many tokens as fit, at 16 bits."""

from __future__ import annotations

from collections.abc import Iterator

from ib_analysis.cache.plan import FULL, RAW
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.policies.policy import Cell
from ib_analysis.policies.uniform import largest_cell


def prune_only(spec: CacheSpec, limit: ByteLimit) -> Iterator[Cell]:
    """A single cell."""
    return largest_cell(spec, limit, RAW.format, FULL)
