"""The information bottleneck of LLM KV caches: measure it, spend a memory budget optimally, compress for real."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ib_analysis.cache.attention import cache_argument as cache_argument
    from ib_analysis.cache.compressed import CompressedCache as CompressedCache
    from ib_analysis.experiments.heads import information as information
    from ib_analysis.experiments.plane import information_plane as information_plane
    from ib_analysis.model.load import load as load
    from ib_analysis.search.allocation import Allocation as Allocation
    from ib_analysis.search.budget import Budget as Budget
    from ib_analysis.search.optimize import optimal_allocation as optimal_allocation
    from ib_analysis.search.profile import Profile as Profile

# Imported when first asked for: PyTorch and transformers take seconds, which a command line's --help should not.
_MODULES = {
    "Allocation": "search.allocation",
    "Budget": "search.budget",
    "CompressedCache": "cache.compressed",
    "Profile": "search.profile",
    "cache_argument": "cache.attention",
    "information": "experiments.heads",
    "information_plane": "experiments.plane",
    "load": "model.load",
    "optimal_allocation": "search.optimize",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
