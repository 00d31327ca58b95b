"""Value-aware attention: how far a token moves the head's output, root mean square over the observed queries."""

from __future__ import annotations

from ib_kernels.scoring import value_aware_scores
from torch import Tensor

from ib_analysis.scorers.scorer import OBSERVED_QUERIES


def value_aware(query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
    """Mean over queries of p_i^2 |v_i - o|^2, the square of the output's change to first order in p_i (see `Scorer`)."""
    return value_aware_scores(query[:, :, -OBSERVED_QUERIES:], keys, values, valid, scaling)
