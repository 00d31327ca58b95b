"""How many tokens at which precision, where? Grids of candidates; measurement chooses among them."""

from collections.abc import Callable

from ib_analysis.plan import Pinned, Plans
from ib_analysis.policies.uniform import prune_only, quantize_only, uniform_grid
from ib_analysis.shape import CacheShape

POLICIES: dict[str, Callable[[CacheShape, Pinned, int, float], list[Plans]]] = {
    "uniform": uniform_grid,
    "prune_only": prune_only,
    "quantize_only": quantize_only,
}

__all__ = ["POLICIES"]
