"""MINE (Belghazi et al. 2018, arXiv 1801.04062): the bound of Donsker & Varadhan with a trained critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ib_analysis.estimators.critic import exponential_pairs, lower_bound
from ib_analysis.estimators.estimate import Estimate
from ib_analysis.estimators.samples import Array, check_samples


@dataclass(frozen=True)
class MINE:
    """E s(x, y) - log E e^s(x, y'), with y' of another sample: a lower bound up to the noise of the second mean.

    All pairs of a batch enter that mean, so the moving average by which the paper corrects its gradient is not needed.
    """

    name: ClassVar[str] = "mine"

    def estimate(self, x: Array, y: Array, documents: Array | None = None) -> Estimate:
        """See Estimator. Needs 64 samples of 8 documents: half trains the critic, a quarter is measured."""
        return lower_bound(check_samples(x, y, documents), contributions)


def contributions(scores: Tensor) -> Tensor:
    """Nats [..., B] of each sample, from scores [..., B, B]: what it adds as a pair, as an x' and as a y'."""
    of_x, of_y, mean = exponential_pairs(scores)
    return scores.diagonal(dim1=-2, dim2=-1) - mean.log() - (of_x + of_y) / mean + 2
