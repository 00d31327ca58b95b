"""Information of jointly Gaussian variables, from their covariance."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import ClassVar

import numpy as np
import torch
from scipy.special import digamma
from torch import Tensor

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators.bootstrap import bootstrap_interval
from ib_analysis.estimators.estimate import GAUSSIAN_MISFIT, NOT_CONVERGED, Estimate, drifts, limited
from ib_analysis.estimators.samples import Array, Samples, check_samples, standardized

LEAST_PIVOT = 1e-12  # 1 - R^2 of a column given those before it; below, it is a copy up to rounding
RIDGE = 1e-11  # of a variance: above LEAST_PIVOT, far below the rounding of 16-bit floats
MISFIT_DEVIATIONS = 5.0
NORMAL_QUANTILE = 1.96


@dataclass(frozen=True)
class Gaussian:
    """1/2 log2 |Sigma_x| |Sigma_y| / |Sigma_xy| of the sample covariance, less its exact bias under a Gaussian.

    Too low for variables that depend beyond their correlation: "Gaussian misfit" is raised where the kurtosis of Mardia
    (1970) is not that of a Gaussian. Invariant under invertible linear maps of x and of y. All heads are computed at once.
    """

    name: ClassVar[str] = "gaussian"

    def estimate(self, x: Array, y: Array, documents: Array | None = None) -> Estimate:
        """See Estimator. Needs more samples than dimensions."""
        return estimate_gaussian(check_samples(x, y, documents))


def estimate_gaussian(samples: Samples) -> Estimate:
    """The estimate of checked samples."""
    dim_x, count = samples.dim_x, samples.count
    z = torch.cat([standardized(samples.x), standardized(samples.y)], dim=-1)  # [..., N, D]
    factors = _factors(z.mT @ z / count, dim_x, count)
    bits = _information_bits(*factors, count)
    distances = _squared_distances(z, *factors)
    low, high = bootstrap_interval(bits, _influence_bits(*distances), samples.documents)
    least = NORMAL_QUANTILE * (dim_x * samples.dim_y / 2) ** 0.5 / count / log(2)
    low, high = low.minimum(bits - least), high.maximum(bits + least)
    dimensions = (dim_x, samples.dim_y, z.shape[-1])
    misfits = [misfit(squared, dimension) for squared, dimension in zip(distances, dimensions)]
    flags = {GAUSSIAN_MISFIT: torch.stack(misfits).any(0)}
    if count >= 8 * z.shape[-1]:
        halves, quarters = (_mean_of_parts(z, dim_x, parts) for parts in (2, 4))
        flags[NOT_CONVERGED] = drifts(bits, halves, quarters, (high - low) / 2)
    return limited(samples, bits, low, high, flags)


def information_bits(covariance: Tensor, dim_x: int, count: int) -> Tensor:
    """Information in bits [...] from covariances [..., D, D] of `count` samples, x first; unbiased for Gaussians.

    Raises EstimatorError if there are no more samples than dimensions, or if some columns determine others.
    """
    return _information_bits(*_factors(covariance, dim_x, count), count)


def total_correlation_bits(values: Tensor) -> Tensor:
    """-1/2 log2 |correlation| [...] of values [..., N, d]: what the sum of column entropies counts twice; unbiased if Gaussian.

    Raises EstimatorError if there are no more samples than columns, or if some columns determine others.
    """
    z = standardized(values)
    factor, _ = _factors(z.mT @ z / z.shape[-2], z.shape[-1], z.shape[-2])
    return _total_correlation_bits(factor, z.shape[-2])


def information_or_nan_bits(correlation: Tensor, dim_x: int, count: int) -> Tensor:
    """As `information_bits`, [...] from correlations [..., D, D]; NaN where it would raise, so that other heads have theirs."""
    (joint, joint_holds), (last, last_holds) = (_factor(part) for part in (correlation, correlation[..., dim_x:, dim_x:]))
    if count <= correlation.shape[-1]:
        return torch.full_like(joint_holds, torch.nan, dtype=joint.dtype)
    return _information_bits(joint, last, count).where(joint_holds & last_holds, torch.nan)


def total_correlation_or_nan_bits(correlation: Tensor, count: int) -> Tensor:
    """As `total_correlation_bits`, [...] from correlations [..., d, d] of `count` samples; NaN where it would raise."""
    factor, holds = _factor(correlation)
    if count <= correlation.shape[-1]:
        return torch.full_like(holds, torch.nan, dtype=factor.dtype)
    return _total_correlation_bits(factor, count).where(holds, torch.nan)


def regular(covariance: Tensor) -> Tensor:
    """Correlations of covariances [..., D, D], made regular: a constant variable becomes an independent one, and copies up to
    rounding share 20 bits rather than infinitely many."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    varies = variance > LEAST_PIVOT * variance.amax(-1, keepdim=True)
    scale = variance.where(varies, 1).rsqrt() * varies
    correlation = covariance * scale[..., None] * scale[..., None, :]
    return correlation + torch.diag_embed(torch.where(varies, RIDGE, 1.0).to(covariance.dtype))


def bias_nats(dim_x: int, dim_y: int, count: int) -> float:
    """Mean of the plug-in estimate of independent Gaussians."""
    alone = _log_determinant_bias(dim_x, count) + _log_determinant_bias(dim_y, count)
    return (alone - _log_determinant_bias(dim_x + dim_y, count)) / 2


def _log_determinant_bias(dim: int, count: int) -> float:
    """E log |W / 2| of a standard Wishart matrix with count - 1 degrees of freedom."""
    return float(digamma((count - 1 - np.arange(dim)) / 2).sum())


def _factors(covariance: Tensor, dim_x: int, count: int) -> tuple[Tensor, Tensor]:
    """Cholesky factors of the correlation of x and y [..., D, D], and of that of y [..., dy, dy]."""
    dim = covariance.shape[-1]
    if count <= dim:
        raise EstimatorError(f"{count} samples of {dim} dimensions have a singular covariance: pass at least {10 * dim}")
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    if (variance <= 0).any():
        raise EstimatorError("some column of x or y is constant: drop it, it carries no information")
    scale = variance.rsqrt()
    correlation = covariance * scale[..., None] * scale[..., None, :]
    joint, joint_failed = torch.linalg.cholesky_ex(correlation)
    last, last_failed = torch.linalg.cholesky_ex(correlation[..., dim_x:, dim_x:])
    in_x = joint_failed.where(joint_failed <= dim_x, 0)
    _check_pivots(joint[..., :dim_x, :dim_x], in_x, "x, or a combination of its columns, is redundant: drop column")
    _check_pivots(last, last_failed, "y, or a combination of its columns, is redundant: drop column")
    _check_pivots(joint, joint_failed, "x determines y up to rounding, so the information is infinite: see joint column")
    return joint, last


def _factor(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor [..., D, D], and whether it exists with no pivot that rounding could have made [...]."""
    factor, failed = torch.linalg.cholesky_ex(correlation)
    return factor, (failed == 0) & (factor.diagonal(dim1=-2, dim2=-1).square() >= LEAST_PIVOT).all(-1)


def _check_pivots(factor: Tensor, failed: Tensor, reason: str) -> None:
    """Raises EstimatorError for a vanishing pivot; `failed` [...] is the column at which Cholesky stopped, from 1."""
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    columns = torch.arange(1, pivots.shape[-1] + 1, device=pivots.device)
    dependent = (pivots < LEAST_PIVOT) | (columns == failed[..., None])
    if dependent.any():
        *head, column = dependent.nonzero()[0].tolist()
        raise EstimatorError(f"{reason} {column}" + (f" of head {head}" if head else ""))


def _total_correlation_bits(factor: Tensor, count: int) -> Tensor:
    dim = factor.shape[-1]
    nats = -factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return (nats - (dim * _log_determinant_bias(1, count) - _log_determinant_bias(dim, count)) / 2) / log(2)


def _information_bits(joint: Tensor, last: Tensor, count: int) -> Tensor:
    # The last pivots of the joint factor are those of y given x.
    dim_y = last.shape[-1]
    dim_x = joint.shape[-1] - dim_y
    given_x = joint.diagonal(dim1=-2, dim2=-1)[..., dim_x:].log().sum(-1)
    alone = last.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return (alone - given_x - bias_nats(dim_x, dim_y, count)) / log(2)


def _squared_distances(z: Tensor, joint: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared Mahalanobis distances [..., N] of x, of y and of both."""
    dim_x = joint.shape[-1] - last.shape[-1]
    whitened = torch.linalg.solve_triangular(joint, z.mT, upper=False).square()  # [..., D, N]
    whitened_y = torch.linalg.solve_triangular(last, z[..., dim_x:].mT, upper=False).square()
    return whitened[..., :dim_x, :].sum(-2), whitened_y.sum(-2), whitened.sum(-2)


def _influence_bits(x: Tensor, y: Tensor, both: Tensor) -> Tensor:
    """N - 1 times what leaving out each sample [..., N] changes, exact: |S without i| = |S| (1 - m_i / (N - 1))."""
    rest = x.shape[-1] - 1
    left_out = torch.log1p(-both / rest) - torch.log1p(-x / rest) - torch.log1p(-y / rest)
    return rest / 2 * left_out / log(2)


def misfit(squared: Tensor, dim: int) -> Tensor:
    """Whether squared Mahalanobis distances [..., N] have an improbable mean square [...]: the kurtosis test of Mardia (1974)."""
    n = squared.shape[-1]
    mean = dim * (dim + 2) * (n - 1) / (n + 1)
    spread = 8 * dim * (dim + 2) * (n - 3) * (n - dim - 1) * (n - dim + 1) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    return ~((squared.square().mean(-1) - mean).abs() <= MISFIT_DEVIATIONS * max(spread, 0.0) ** 0.5)  # NaN misfits


def _mean_of_parts(z: Tensor, dim_x: int, parts: int) -> Tensor:
    """Mean estimate in bits [...] over interleaved parts of the samples z [..., N, D]; NaN if one is singular."""
    size = z.shape[-2] // parts
    part = z[..., : parts * size, :].unflatten(-2, (size, parts)).movedim(-2, -3)  # [..., parts, N / parts, D]
    part = part - part.mean(-2, keepdim=True)
    covariance = part.mT @ part / size
    return information_or_nan_bits(covariance, dim_x, size).mean(-1)
