"""Information through a quantizer whose error acts as independent uniform noise (Zamir & Feder 1992)."""

from __future__ import annotations

from dataclasses import dataclass
from math import e, log, log2, pi
from typing import ClassVar

import torch
from torch import Tensor

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators.bootstrap import bootstrap_interval
from ib_analysis.estimators.estimate import GAUSSIAN_MISFIT, Estimate, limited
from ib_analysis.estimators.gaussian import misfit
from ib_analysis.estimators.samples import Array, check_samples

SPACE_FILLING_BITS = log2(2 * pi * e / 12) / 2  # by which uniform noise can say more than Gaussian noise: 0.2546 a dimension
LEAST_NOISE = 1e-12  # of y's variance; below, y is a copy up to rounding
MOST_NOISE = 0.5  # of y's variance; beyond, no quantizer made y, as even one of 1 bit leaves 0.36


@dataclass(frozen=True)
class DitheredChannel:
    """I(X; X + N), N independent of X and uniform in each cell of the quantizer that made y [..., N, d] of x [..., N, d].

    Not limited by log N. `bits` is 1/2 log2 |1 + Sigma / (step^2 / 12)|: the lower end for a Gaussian x, while no x of this
    covariance exceeds it by more than 0.2546 bits a dimension. `interval` spans both ends and their sampling error. The
    noise of a channel is what y_j does not share linearly with x_j, so decoders that shrink towards the mean are understood.
    """

    name: ClassVar[str] = "dithered_channel"

    def estimate(self, x: Array, y: Array, documents: Array | None = None) -> Estimate:
        """See Estimator; y holds the decoded values of x, channel by channel."""
        samples = check_samples(x, y, documents)
        if samples.dim_x != samples.dim_y:
            raise EstimatorError(f"y must hold the decoded channels of x, but they have {samples.dim_y} and {samples.dim_x}")
        centred = samples.x - samples.x.mean(-2, keepdim=True)
        scaled, noise = _in_units_of_noise(centred, samples.y - samples.y.mean(-2, keepdim=True))
        covariance = scaled.mT @ scaled / samples.count  # [..., d, d]
        bits, factor, share = _gaussian_bits(covariance, samples.count)
        received = torch.linalg.solve_triangular(factor, scaled.mT, upper=False).square().sum(-2)  # [..., N]
        power = covariance.diagonal(dim1=-2, dim2=-1)[..., None, :]  # of each channel, noise being 1
        of_noise = noise.square() - 2 * noise * scaled / power  # influence on the log of the noise power [..., N, d]
        lost = (share.diagonal(dim1=-2, dim2=-1)[..., None, :] * of_noise).sum(-1)
        low, high = bootstrap_interval(bits, (received - lost) / (2 * log(2)), samples.documents)
        return limited(samples, bits, low, high + samples.dim_x * SPACE_FILLING_BITS, {GAUSSIAN_MISFIT: _misfit(centred)})


def channel_bits(covariance: Tensor, count: int) -> Tensor:
    """The `bits` of DitheredChannel [...] from covariances [..., 2 d, 2 d] of (x, y) in `count` samples.

    A channel in which x or y is constant carries nothing; a copy up to rounding counts as 20 bits.
    """
    dim = covariance.shape[-1] // 2
    source, received = covariance[..., :dim, :dim], covariance[..., dim:, dim:]
    power_x, power_y = source.diagonal(dim1=-2, dim2=-1), received.diagonal(dim1=-2, dim2=-1)
    gain = (covariance[..., :dim, dim:].diagonal(dim1=-2, dim2=-1) / power_x).nan_to_num(0, 0, 0)
    noise = (power_y - gain.square() * power_x).maximum(LEAST_NOISE * power_y)
    scale = (gain / noise.sqrt()).nan_to_num(0, 0, 0)
    return _gaussian_bits(source * scale[..., None] * scale[..., None, :], count)[0]


def _gaussian_bits(covariance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """1/2 log2 |1 + Sigma|, unbiased; the Cholesky factor of 1 + Sigma; Sigma / (1 + Sigma), of each direction's variance."""
    factor = torch.linalg.cholesky(covariance + torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device))
    share = torch.cholesky_solve(covariance, factor)
    traces = _trace(share).square() + _trace(share @ share)
    # Second order of the logarithm in the sampling error of the covariance, as Wishart matrices have it.
    return (factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + traces / (4 * (count - 1))) / log(2), factor, share


def _in_units_of_noise(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """a x and w of y = a x + w for each channel [..., N, d] of centred x and y, both divided by the deviation of w."""
    gain = (x * y).mean(-2, keepdim=True) / x.square().mean(-2, keepdim=True)
    noise = y - gain * x
    power = noise.square().mean(-2, keepdim=True)  # [..., 1, d]
    share = power / y.square().mean(-2, keepdim=True)
    if (share < LEAST_NOISE).any():
        raise EstimatorError("y is a copy of x up to rounding in some channel, so its information is infinite")
    if (share > MOST_NOISE).any():
        raise EstimatorError("y shares less than half of its variance with x in some channel: it is no decoded x, use Gaussian")
    return gain * x / power.sqrt(), noise / power.sqrt()


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _misfit(centred: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(centred.mT @ centred / centred.shape[-2])
    squared = torch.linalg.solve_triangular(factor, centred.mT, upper=False).square().sum(-2)
    return misfit(squared, centred.shape[-1]) | (failed != 0)
