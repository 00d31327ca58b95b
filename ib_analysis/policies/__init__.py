"""How many tokens at which precision, where? A new policy is one file and one row in POLICIES."""

from ib_analysis.policies.policy import Cell, Policy
from ib_analysis.policies.prune_only import prune_only
from ib_analysis.policies.quantize_only import quantize_only
from ib_analysis.policies.uniform import uniform

POLICIES: dict[str, Policy] = {"uniform": uniform, "prune-only": prune_only, "quantize-only": quantize_only}

__all__ = ["POLICIES", "Cell", "Policy"]
