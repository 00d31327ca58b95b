"""Information of variables that become Gaussian when each column is mapped to normal scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ib_analysis.estimators.estimate import Estimate
from ib_analysis.estimators.gaussian import estimate_gaussian
from ib_analysis.estimators.order import as_given, runs
from ib_analysis.estimators.samples import Array, check_samples


@dataclass(frozen=True)
class CopulaGaussian:
    """The Gaussian estimate of normal scores, so invariant under increasing maps of each column (Ince et al. 2017).

    Right if the copula is Gaussian, whatever the margins; else "Gaussian misfit" is raised as by Gaussian.
    """

    name: ClassVar[str] = "copula_gaussian"

    def estimate(self, x: Array, y: Array, documents: Array | None = None) -> Estimate:
        """See Estimator. Needs more samples than dimensions."""
        return estimate_gaussian(check_samples(x, y, documents), normal_scores)


def normal_scores(values: Tensor) -> Tensor:
    """Normal quantiles of rank / (N + 1) in each column of values [..., N, d]; equal values share their mean rank."""
    count = values.shape[-2]
    half_ranks = torch.arange(2 * count + 1, dtype=torch.float64, device=values.device)
    table = torch.special.ndtri(half_ranks / 2 / (count + 1))  # of every rank that there can be
    order, less, not_greater = runs(values)
    return as_given(order, table.take(less + not_greater + 1))
