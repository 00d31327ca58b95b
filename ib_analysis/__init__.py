"""The information bottleneck of LLM KV caches: measure it, spend a memory budget optimally, compress for real."""

from ib_analysis.allocation import Allocation
from ib_analysis.budget import Budget
from ib_analysis.cache import CompressedCache
from ib_analysis.information import information
from ib_analysis.models import load
from ib_analysis.optimize import optimal_allocation
from ib_analysis.plane import information_plane
from ib_analysis.profile import Profile

__all__ = ["Allocation", "Budget", "CompressedCache", "Profile", "information", "information_plane", "load", "optimal_allocation"]
