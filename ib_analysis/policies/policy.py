"""What a policy is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ib_analysis.cache.plan import Plans
from ib_analysis.cache.spec import ByteLimit, CacheSpec


@dataclass(frozen=True)
class Cell:
    """Plans that a policy proposes, with the label that tables and figures show."""

    plans: Plans
    family: str  # the kind of cache that it is, "prune-only" say
    setting: str  # its parameters in words


class Policy(Protocol):
    def __call__(self, spec: CacheSpec, limit: ByteLimit) -> Iterable[Cell]:
        """Caches of this kind within the limit, each as large as it may be; none where nothing fits.

        Within the limit: `limit.excess(cell.plans) == 0`. Measurement chooses among them.
        """
        ...
