"""InfoNCE (van den Oord et al. 2018, arXiv 1807.03748): tell the y of x from those of other samples."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import ClassVar

from torch import Tensor

from ib_analysis.estimators.critic import lower_bound
from ib_analysis.estimators.estimate import Estimate
from ib_analysis.estimators.samples import Array, check_samples


@dataclass(frozen=True)
class InfoNCE:
    """E log [e^s(x, y) / mean_j e^s(x, y_j)] over batches of 256: a lower bound that cannot exceed log2 256 = 8 bits."""

    name: ClassVar[str] = "infonce"

    def estimate(self, x: Array, y: Array, documents: Array | None = None) -> Estimate:
        """See Estimator. Needs 64 samples of 8 documents: half trains the critic, a quarter is measured."""
        return lower_bound(check_samples(x, y, documents), contributions)


def contributions(scores: Tensor) -> Tensor:
    """Nats [..., B] of each x, from scores [..., B, B]."""
    return scores.diagonal(dim1=-2, dim2=-1) - scores.logsumexp(-1) + log(scores.shape[-1])
