"""The bound of Nguyen, Wainwright & Jordan (2010, arXiv 0809.0853), also called f-GAN KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ib_analysis.estimators.critic import exponential_pairs, lower_bound
from ib_analysis.estimators.estimate import Estimate
from ib_analysis.estimators.samples import Array, check_samples


@dataclass(frozen=True)
class NWJ:
    """1 + E s(x, y) - E e^s(x, y'), with y' of another sample: a lower bound whose variance grows as e^I."""

    name: ClassVar[str] = "nwj"

    def estimate(self, x: Array, y: Array, documents: Array | None = None) -> Estimate:
        """See Estimator. Needs 64 samples of 8 documents: half trains the critic, a quarter is measured."""
        return lower_bound(check_samples(x, y, documents), contributions)


def contributions(scores: Tensor) -> Tensor:
    """Nats [..., B] of each sample, from scores [..., B, B]: what it adds as a pair, as an x' and as a y'."""
    of_x, of_y, mean = exponential_pairs(scores)
    return 1 + scores.diagonal(dim1=-2, dim2=-1) - of_x - of_y + mean
