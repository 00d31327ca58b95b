"""Gaussian information from a stream of samples, in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.special import stdtrit
from torch import Tensor

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators.bootstrap import LEVEL
from ib_analysis.estimators.estimate import TOO_FEW, Estimate, flagged, too_few
from ib_analysis.estimators.gaussian import information_bits
from ib_analysis.estimators.samples import Array, as_floats, check_pairs

GROUPS = 8  # of documents, which the jackknife leaves out one at a time


class Moments:
    """Mean and covariance of (x, y) for each head, gathered document by document.

    Documents fall into 8 groups in turn (or `groups`), so memory is 8 matrices [dx + dy, dx + dy] of float64 a head. The
    estimate is that of Gaussian; its interval is a jackknife over groups, and the kurtosis that "Gaussian misfit" needs is
    not kept.
    """

    def __init__(self, groups: int = GROUPS) -> None:
        self.groups = groups
        self.documents = 0
        self.dim_x = 0
        self.counts: Tensor  # [G]
        self.means: Tensor  # [G, ..., D]
        self.scatters: Tensor  # [G, ..., D, D], sums of squares about the mean

    def add(self, x: Array, y: Array) -> None:
        """Adds one document's samples x [..., N, dx] and y [..., N, dy]; N may be 1, and differ between documents."""
        first, second = as_floats("x", x), as_floats("y", y)
        check_pairs(first, second, least=1)
        z = torch.cat([first, second.to(first.device)], dim=-1)  # [..., N, D]
        shape = (self.groups, *z.shape[:-2], z.shape[-1])
        if self.documents == 0:
            self.dim_x = first.shape[-1]
            self.counts = torch.zeros(self.groups, dtype=torch.float64, device=z.device)
            self.means = torch.zeros(shape, dtype=torch.float64, device=z.device)
            self.scatters = torch.zeros((*shape, z.shape[-1]), dtype=torch.float64, device=z.device)
        elif self.means.shape != shape or self.dim_x != first.shape[-1]:
            raise EstimatorError(
                f"every document must have the same heads and dimensions, got {list(first.shape)} and {list(second.shape)}"
            )
        mean = z.mean(-2)
        centred = z - mean[..., None, :]
        self._merge(self.documents % self.groups, float(z.shape[-2]), mean, centred.mT @ centred)
        self.documents += 1

    def estimate(self) -> Estimate:
        """Information of every head. Raises EstimatorError if there are too few documents or samples, or if columns depend."""
        if self.documents < GROUPS:
            raise EstimatorError(f"{self.documents} documents are too few for an interval: add at least {GROUPS}")
        bits, width = self.jackknife(lambda covariance, count: information_bits(covariance, self.dim_x, count))
        few = too_few(self.count, self.documents, self.means.shape[-1])
        return flagged(bits, bits - width, bits + width, {TOO_FEW: torch.full_like(bits, few, dtype=torch.bool)})

    @property
    def count(self) -> int:
        """Samples added."""
        return int(self.counts.sum())

    def jackknife(self, bits_of: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
        """(bits, half of the width of their 95% interval) [...], bits_of(covariance [..., D, D], samples) giving bits [...].

        The width is NaN if there are fewer documents than groups.
        """
        groups = torch.arange(self.groups, device=self.counts.device)
        bits = bits_of(*self.covariance())
        if self.groups < 2 or self.documents < self.groups:
            return bits, torch.full_like(bits, torch.nan)
        left_out = torch.stack([bits_of(*self.covariance(groups[groups != out])) for out in range(self.groups)])  # [G, ...]
        error = (left_out - left_out.mean(0)).square().sum(0).mul((self.groups - 1) / self.groups).sqrt()
        return bits, error * float(stdtrit(self.groups - 1, (1 + LEVEL) / 2))

    def covariance(self, groups: Tensor | None = None) -> tuple[Tensor, int]:
        """(covariance [..., D, D], number of samples) of some groups, by default of all."""
        some = slice(None) if groups is None else groups
        counts, means, scatters = self.counts[some], self.means[some], self.scatters[some]
        count = counts.sum()
        mean = torch.tensordot(counts, means, dims=1) / count
        between = means - mean  # [G, ..., D]
        scatter = scatters.sum(0) + torch.einsum("g,g...i,g...j->...ij", counts, between, between)
        return scatter / count, int(count)

    def _merge(self, group: int, count: float, mean: Tensor, scatter: Tensor) -> None:
        """Adds moments to a group's (Chan, Golub & LeVeque 1983)."""
        before = float(self.counts[group])
        shift = mean - self.means[group]
        self.scatters[group] += scatter + shift[..., :, None] * shift[..., None, :] * (before * count / (before + count))
        self.means[group] += shift * (count / (before + count))
        self.counts[group] += count
