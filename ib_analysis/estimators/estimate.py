"""What every estimator takes and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ib_analysis.estimators.entropy import lesser_entropy_limit_bits
from ib_analysis.estimators.samples import Array, Samples

SATURATED = "saturated"  # near the largest value that the method can return for so many samples
GAUSSIAN_MISFIT = "Gaussian misfit"  # the Gaussian model explains the samples badly
TOO_FEW = "too few samples"  # fewer than 10 a dimension, or than 10 documents
NOT_CONVERGED = "not converged"  # still moving with the number of samples or of training steps, or never moved
ONE_SIDED = "one side unseen"  # distances in x, or in y, are so much larger that those of the other side do not count
CONTRADICTED = "contradicted"  # a view of few dimensions, the ranks or a bound hold clearly more
UNSETTLED = "y not settled by x"  # y varies where x does not, as far as can be seen
ABOVE_ENTROPY = "above H(T)"  # the raw value exceeded the entropy of x or y, and was lowered to it

SATURATED_SHARE = 0.7  # McAllester & Stratos 2020 (arXiv 1811.04251): no lower bound from N samples exceeds O(log N)
SAMPLES_PER_DIMENSION = 10
MIN_DOCUMENTS = 10
MAX_LEFT_BITS = 0.1  # that more samples would still change


@dataclass(frozen=True, eq=False)
class Estimate:
    """Mutual information in bits of every head, [...] for samples [..., N, d].

    `interval` is (low, high) [...] at 95%, in bits: what another draw of the documents would change. It says nothing of a
    method's own bias, which the flags tell of. `flags` holds the flags that some head raised, each with the mask [...] of
    these heads: `"saturated" in estimate.flags`.
    """

    bits: NDArray[np.float64]
    interval: tuple[NDArray[np.float64], NDArray[np.float64]]
    flags: dict[str, NDArray[np.bool_]]

    def __str__(self) -> str:
        if self.bits.ndim > 0:
            return f"{self.bits.size} heads, {self.bits.sum():.3f} bits{''.join(f', {name}' for name in self.flags)}"
        low, high = self.interval
        return f"{self.bits:.3f} bits [{low:.3f}, {high:.3f}]{''.join(f', {name}' for name in self.flags)}"


class Estimator(Protocol):
    """Estimates I(X; Y) from samples."""

    @property
    def name(self) -> str: ...

    def estimate(self, x: Array, y: Array, documents: Array | None = None) -> Estimate:
        """Information of x [..., N, dx] and y [..., N, dy], of one head for each leading index.

        `documents` [N] says which samples belong together (tokens of one text): documents are resampled, not samples.
        Raises EstimatorError for input from which the method can say nothing.
        """
        ...


def limited(samples: Samples, bits: Tensor, low: Tensor, high: Tensor, flags: dict[str, Tensor]) -> Estimate:
    """The estimate from bits, low and high [...], lowered to the entropies of x and of y where these take few values."""
    return limited_to(lesser_entropy_limit_bits(samples.x, samples.y), samples, bits, low, high, flags)


def limited_to(limit: Tensor, samples: Samples, bits: Tensor, low: Tensor, high: Tensor, flags: dict[str, Tensor]) -> Estimate:
    """The estimate from bits, low and high [...], lowered to a limit in bits [...]."""
    limit = limit.to(bits.device)
    above = bits > limit
    bits, low, high = (torch.minimum(value, limit) for value in (bits, low, high))
    few = too_few(samples.count, samples.documents_count, samples.dim_x + samples.dim_y)
    return flagged(bits, low, high, {ABOVE_ENTROPY: above, TOO_FEW: torch.full_like(above, few), **flags})


def flagged(bits: Tensor, low: Tensor, high: Tensor, flags: dict[str, Tensor]) -> Estimate:
    """The estimate from bits, low and high [...], with those flags that some head raises."""
    raised = {name: mask.cpu().numpy() for name, mask in flags.items() if mask.any()}
    return Estimate(bits.cpu().numpy(), (low.cpu().numpy(), high.cpu().numpy()), raised)


def too_few(count: int, documents: int, dim: int) -> bool:
    """Whether so many samples and documents are too few for so many dimensions of x and y together."""
    return count < SAMPLES_PER_DIMENSION * dim or documents < MIN_DOCUMENTS


def drifts(whole: Tensor, halves: Tensor, quarters: Tensor, allowed: Tensor, rate: float | None = None) -> Tensor:
    """Whether the estimates [...] from N, N/2 and N/4 samples move one way, by more than is allowed from N/2 to N.

    Means over all halves and over all quarters use the same samples, so they differ by bias rather than by luck. Where a method's
    bias falls with N^-rate, as much is left as 1 / (2^rate - 1) of the last step, and below 0.1 bits that is no drift.
    """
    step, step_before = whole - halves, halves - quarters
    steady = (step.abs() <= allowed) | (step * step_before < 0)
    if rate is not None:
        steady |= step.abs() / (2**rate - 1) <= MAX_LEFT_BITS
    return ~steady  # NaN, from a part that has no estimate, is drift
