"""Quantization alone: all tokens, at every precision that fits; none fits a small budget."""

from __future__ import annotations

from collections.abc import Iterator

from ib_analysis.cache.plan import HeadPlan, Tier, precisions
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.policies.policy import Cell
from ib_analysis.policies.uniform import uniform


def quantize_only(spec: CacheSpec, limit: ByteLimit) -> Iterator[Cell]:
    """The cells of the uniform grid that evict nothing."""
    whole = {spec.uniform(HeadPlan(fmt, (Tier(1.0, *bits),))) for fmt, bits in precisions(spec.formats)}
    return (cell for cell in uniform(spec, limit) if cell.plans in whole)
