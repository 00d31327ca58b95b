"""Information of jointly Gaussian variables, from their covariance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import digamma
from torch import Tensor

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators.bootstrap import bootstrap_interval
from ib_analysis.estimators.chunks import in_chunks
from ib_analysis.estimators.entropy import lesser_entropy_limit_bits
from ib_analysis.estimators.estimate import GAUSSIAN_MISFIT, NOT_CONVERGED, Estimate, drifts, limited_to
from ib_analysis.estimators.samples import Array, Samples, check_samples
from ib_analysis.estimators.unexplained import is_unexplained

MIN_PIVOT = 1e-12  # 1 - R^2 of a column given those before it; below, it is a copy up to rounding
RIDGE = 1e-11  # of a variance: above MIN_PIVOT, far below the rounding of 16-bit floats
MISFIT_DEVIATIONS = 5.0
NORMAL_QUANTILE = 1.96


@dataclass(frozen=True)
class Gaussian:
    """1/2 log2 |Sigma_x| |Sigma_y| / |Sigma_xy| of the sample covariance, less its exact bias under a Gaussian.

    Too low for variables that depend beyond their correlation: "Gaussian misfit" is raised where the kurtosis of Mardia
    (1970) is not that of a Gaussian, or where more than 0.07 nats are seen that the model leaves unexplained. Invariant
    under invertible linear maps of x and of y.
    """

    name: ClassVar[str] = "gaussian"

    def estimate(self, x: Array, y: Array, documents: Array | None = None) -> Estimate:
        """See Estimator. Needs more samples than dimensions."""
        return estimate_gaussian(check_samples(x, y, documents), lambda values: values)


def estimate_gaussian(samples: Samples, transform: Callable[[Tensor], Tensor]) -> Estimate:
    """The estimate of checked samples, x and y [H, N, d] of a few heads at a time being transformed before."""

    def measured(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return _measured(transform(x), transform(y), samples.documents)

    dim_x, dim_y, count = samples.dim_x, samples.dim_y, samples.count
    _check_count(count, dim_x + dim_y)
    joint, last, joint_failed, last_failed, influence, misfits, limit, *parts = in_chunks(measured, samples.x, samples.y)
    _check_pivots(joint, last, joint_failed, last_failed)
    bits = _information_bits(joint, last, count)
    low, high = bootstrap_interval(bits, influence, samples.documents)
    least = NORMAL_QUANTILE * (dim_x * dim_y / 2) ** 0.5 / count / log(2)
    low, high = low.minimum(bits - least), high.maximum(bits + least)
    flags = {GAUSSIAN_MISFIT: misfits}
    if parts:
        flags[NOT_CONVERGED] = drifts(bits, parts[0], parts[1], (high - low) / 2)
    return limited_to(limit, samples, bits, low, high, flags)


def _measured(x: Tensor, y: Tensor, documents: NDArray[np.int64]) -> tuple[Tensor, ...]:
    """Of samples x [H, N, dx] and y [H, N, dy]: pivots and failures as `_check_pivots` takes them, the influence of each
    sample on the bits [H, N], whether they are unlike a Gaussian's [H], the limit that entropies set to the bits [H], and, if
    there are enough, mean bits over halves and over quarters of them [H]."""
    dim_x, dim_y, count = x.shape[-1], y.shape[-1], x.shape[-2]
    z = torch.cat([x, y], dim=-1)
    z -= z.mean(-2, keepdim=True)
    whole, quarters, sums = _products(z)
    covariance = whole / count
    factor, joint, joint_failed = _factored(covariance)
    factor_y, last, last_failed = _factored(covariance[..., dim_x:, dim_x:])
    distances = _squared_distances(z, factor, factor_y)
    misfits = torch.stack([misfit(squared, dim) for squared, dim in zip(distances, (dim_x, dim_y, dim_x + dim_y))]).any(0)
    open_heads = ~misfits & (joint_failed == 0)
    if open_heads.any():
        misfits[open_heads] = is_unexplained(x[open_heads], y[open_heads], documents)
    influence, limit = _influence_bits(*distances), lesser_entropy_limit_bits(x, y)
    measured = (joint, last, joint_failed, last_failed, influence, misfits, limit)
    if count < 8 * (dim_x + dim_y):
        return measured
    halves, sums_of_halves = (of_quarters.unflatten(1, (2, 2)).sum(1) for of_quarters in (quarters, sums))
    size = count // 4
    return (
        *measured,
        _mean_of_parts(halves, sums_of_halves, 2 * size, dim_x),
        _mean_of_parts(quarters, sums, size, dim_x),
    )


def information_bits(covariance: Tensor, dim_x: int, count: int) -> Tensor:
    """Information in bits [...] from covariances [..., D, D] of `count` samples, x first; unbiased for Gaussians.

    Raises EstimatorError if there are no more samples than dimensions, or if some columns determine others.
    """
    return _information_bits(*_checked_pivots(covariance, dim_x, count), count)


def information_or_nan_bits(covariance: Tensor, dim_x: int, count: int) -> Tensor:
    """As `information_bits`, [...] from covariances [..., D, D]; NaN where it would raise, so that other heads have theirs."""
    (joint, joint_holds), (last, last_holds) = (_held_pivots(part) for part in (covariance, covariance[..., dim_x:, dim_x:]))
    if count <= covariance.shape[-1]:
        return torch.full_like(joint_holds, torch.nan, dtype=joint.dtype)
    return _information_bits(joint, last, count).where(joint_holds & last_holds, torch.nan)


def total_correlation_or_nan_bits(covariance: Tensor, count: int) -> Tensor:
    """-1/2 log2 |correlation| [...] from covariances [..., d, d] of `count` samples: what the sum of column entropies counts
    twice; unbiased if Gaussian. NaN where there are no more samples than columns, or where some columns determine others."""
    pivots, holds = _held_pivots(covariance)
    dim = covariance.shape[-1]
    if count <= dim:
        return torch.full_like(holds, torch.nan, dtype=pivots.dtype)
    bias = dim * _log_determinant_bias(1, count) - _log_determinant_bias(dim, count)
    return ((-pivots.log().sum(-1) - bias / 2) / log(2)).where(holds, torch.nan)


def regular(covariance: Tensor) -> Tensor:
    """Correlations of covariances [..., D, D], made regular: a constant variable becomes an independent one, and copies up to
    rounding share 20 bits rather than infinitely many."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    varies = variance > MIN_PIVOT * variance.amax(-1, keepdim=True)
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


def _factored(covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky factor [..., D, D] of covariances; its pivots [..., D], the deviation of each variable given those before as a
    share of its own; and the column at which it stopped, from 1 [...], or 0 if it exists."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    return factor, factor.diagonal(dim1=-2, dim2=-1) / covariance.diagonal(dim1=-2, dim2=-1).sqrt(), failed


def _held_pivots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Pivots [..., D], and whether all exist and rounding could have made none of them [...]."""
    _, pivots, failed = _factored(covariance)
    return pivots, (failed == 0) & (pivots.square() >= MIN_PIVOT).all(-1)


def _checked_pivots(covariance: Tensor, dim_x: int, count: int) -> tuple[Tensor, Tensor]:
    """Pivots of x and y [..., D], and of y alone [..., dy]."""
    _check_count(count, covariance.shape[-1])
    if (covariance.diagonal(dim1=-2, dim2=-1) <= 0).any():
        raise EstimatorError("some column of x or y is constant: drop it, it carries no information")
    _, joint, joint_failed = _factored(covariance)
    _, last, last_failed = _factored(covariance[..., dim_x:, dim_x:])
    _check_pivots(joint, last, joint_failed, last_failed)
    return joint, last


def _check_count(count: int, dim: int) -> None:
    if count <= dim:
        raise EstimatorError(f"{count} samples of {dim} dimensions have a singular covariance: pass at least {10 * dim}")


def _check_pivots(joint: Tensor, last: Tensor, joint_failed: Tensor, last_failed: Tensor) -> None:
    """Raises EstimatorError if a pivot of x and y [..., D], or of y [..., dy], vanishes or was not reached."""
    dim_x = joint.shape[-1] - last.shape[-1]
    in_x = joint_failed.where(joint_failed <= dim_x, 0)
    _check_each_pivot(joint[..., :dim_x], in_x, "x, or a combination of its columns, is redundant: drop column")
    _check_each_pivot(last, last_failed, "y, or a combination of its columns, is redundant: drop column")
    _check_each_pivot(joint, joint_failed, "x determines y up to rounding, so the information is infinite: see joint column")


def _check_each_pivot(pivots: Tensor, failed: Tensor, reason: str) -> None:
    columns = torch.arange(1, pivots.shape[-1] + 1, device=pivots.device)
    dependent = (pivots.square() < MIN_PIVOT) | (columns == failed[..., None])
    if dependent.any():
        *head, column = dependent.nonzero()[0].tolist()
        raise EstimatorError(f"{reason} {column}" + (f" of head {head}" if head else ""))


def _information_bits(joint: Tensor, last: Tensor, count: int) -> Tensor:
    # The last pivots of x and y are those of y given x.
    dim_y = last.shape[-1]
    dim_x = joint.shape[-1] - dim_y
    return (last.log().sum(-1) - joint[..., dim_x:].log().sum(-1) - bias_nats(dim_x, dim_y, count)) / log(2)


def _squared_distances(z: Tensor, joint: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared Mahalanobis distances [..., N] of x, of y and of both, from factors of covariances."""
    dim_x = joint.shape[-1] - last.shape[-1]
    whitened = torch.linalg.solve_triangular(joint, z.mT, upper=False)  # [..., D, N]
    whitened_y = torch.linalg.solve_triangular(last, z[..., dim_x:].mT, upper=False)
    x, rest, y = (torch.linalg.vector_norm(part, dim=-2).square() for part in (*whitened.tensor_split([dim_x], -2), whitened_y))
    return x, y, x + rest


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


def _products(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Products of columns z [H, N, D] summed over all samples [H, D, D] and over interleaved quarters [H, 4, D, D], and the
    sums of the latter [H, 4, D]. Quarters leave out up to 3 samples at the end."""
    end = z.shape[-2] // 4 * 4
    parts = [z[:, start:end:4] for start in range(4)]
    quarters = torch.stack([part.mT @ part for part in parts], dim=1)
    rest = z[:, end:]
    return quarters.sum(1) + rest.mT @ rest, quarters, torch.stack([part.sum(-2) for part in parts], dim=1)


def _mean_of_parts(products: Tensor, sums: Tensor, size: int, dim_x: int) -> Tensor:
    """Mean estimate in bits [H] over parts of `size` samples, from what `_products` returns of them; NaN if one is singular."""
    covariance = (products - sums[..., None] * (sums / size)[..., None, :]) / size
    return information_or_nan_bits(covariance, dim_x, size).mean(-1)
