"""Information through a quantizer whose error acts as independent uniform noise (Zamir & Feder 1992)."""

from __future__ import annotations

from dataclasses import dataclass
from math import e, log, log2, pi
from typing import ClassVar

import torch
from torch import Tensor

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators.bootstrap import bootstrap_interval
from ib_analysis.estimators.chunks import in_chunks
from ib_analysis.estimators.estimate import GAUSSIAN_MISFIT, Estimate, limited
from ib_analysis.estimators.gaussian import misfit
from ib_analysis.estimators.samples import Array, check_samples

SPACE_FILLING_BITS = log2(2 * pi * e / 12) / 2  # by which uniform noise can say more than Gaussian noise: 0.2546 a dimension
MIN_NOISE = 1e-12  # of y's variance; below, y is a copy up to rounding
MAX_NOISE = 0.5  # of y's variance; beyond, no quantizer made y, as even one of 1 bit leaves 0.36


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
        bits, influence, misfits = in_chunks(_measured, samples.x, samples.y)
        low, high = bootstrap_interval(bits, influence, samples.documents)
        return limited(samples, bits, low, high + samples.dim_x * SPACE_FILLING_BITS, {GAUSSIAN_MISFIT: misfits})


def _measured(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bits [H], the influence of each sample on them [H, N], and whether x is unlike a Gaussian [H], of x and y [H, N, d]."""
    scaled, noise = _in_units_of_noise(x - x.mean(-2, keepdim=True), y - y.mean(-2, keepdim=True))
    covariance = scaled.mT @ scaled / x.shape[-2]  # [H, d, d]
    bits, factor, share = _gaussian_bits(covariance, x.shape[-2])
    power = covariance.diagonal(dim1=-2, dim2=-1)[..., None, :]  # of each channel, noise being 1
    of_noise = noise * (noise - scaled * (2 / power))  # influence on the log of the noise power [H, N, d]
    lost = (of_noise @ share.diagonal(dim1=-2, dim2=-1)[..., None])[..., 0]
    influence = (_squared_distances(scaled, factor) - lost) / (2 * log(2))
    own_factor, failed = torch.linalg.cholesky_ex(covariance)
    return bits, influence, misfit(_squared_distances(scaled, own_factor), x.shape[-1]) | (failed != 0)


def channel_bits(covariance: Tensor, count: int) -> Tensor:
    """The `bits` of DitheredChannel [...] from covariances [..., 2 d, 2 d] of (x, y) in `count` samples.

    A channel in which x or y is constant carries nothing; a copy up to rounding counts as 20 bits.
    """
    dim = covariance.shape[-1] // 2
    source, received = covariance[..., :dim, :dim], covariance[..., dim:, dim:]
    power_x, power_y = source.diagonal(dim1=-2, dim2=-1), received.diagonal(dim1=-2, dim2=-1)
    gain = (covariance[..., :dim, dim:].diagonal(dim1=-2, dim2=-1) / power_x).nan_to_num(0, 0, 0)
    noise = (power_y - gain.square() * power_x).maximum(MIN_NOISE * power_y)
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
    noise = torch.addcmul(y, gain, x, value=-1)
    power = noise.square().mean(-2, keepdim=True)  # [..., 1, d]
    share = power / y.square().mean(-2, keepdim=True)
    if (share < MIN_NOISE).any():
        raise EstimatorError("y is a copy of x up to rounding in some channel, so its information is infinite")
    if (share > MAX_NOISE).any():
        raise EstimatorError("y shares less than half of its variance with x in some channel: it is no decoded x, use Gaussian")
    return x * (gain / power.sqrt()), noise / power.sqrt()


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _squared_distances(values: Tensor, factor: Tensor) -> Tensor:
    """Squared Mahalanobis distances [H, N] of values [H, N, d], from the Cholesky factor of their covariance [H, d, d]."""
    return torch.linalg.vector_norm(torch.linalg.solve_triangular(factor, values.mT, upper=False), dim=-2).square()
