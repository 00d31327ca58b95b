"""What no compressor can beat: optima of Gaussian sources, and limits of any source. Everything in bits."""

from __future__ import annotations

from math import e, log, log2, pi

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ib_analysis.errors import EstimatorError


def canonical_correlations(covariance: ArrayLike, dim_x: int) -> NDArray[np.float64]:
    """Canonical correlations of x and y, largest first, from their joint covariance [dx + dy, dx + dy], x first."""
    matrix = np.asarray(covariance, dtype=np.float64)
    factor_x, factor_y = np.linalg.cholesky(matrix[:dim_x, :dim_x]), np.linalg.cholesky(matrix[dim_x:, dim_x:])
    whitened = np.linalg.solve(factor_y, np.linalg.solve(factor_x, matrix[:dim_x, dim_x:]).T)
    return np.minimum(np.linalg.svd(whitened, compute_uv=False), 1.0)


def gaussian_bottleneck(correlations: ArrayLike, beta: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(I(X; T), I(T; Y)) in bits [...] of the T that minimises I(X; T) - beta I(T; Y), for each beta [...] > 1.

    x and y are Gaussian with these canonical correlations [k], all below 1 (Chechik et al. 2005, theorem 3.1). As beta grows
    the curve approaches I(X; Y). Points with independent dither lie below it.
    """
    tradeoff = np.asarray(beta, dtype=np.float64)[..., None]  # [..., 1]
    squared = np.square(np.asarray(correlations, dtype=np.float64))  # [k]
    if not ((tradeoff > 1).all() and (squared < 1).all()):  # NaN is neither
        raise EstimatorError("the Gaussian bottleneck needs beta > 1 and correlations below 1")
    remainder = 1 - squared  # lambda in the paper
    active = (squared > 0) & (remainder < 1 - 1 / tradeoff)
    ratio = np.where(active, (tradeoff - 1) * squared / remainder, 1.0)
    rate = np.log2(ratio).sum(-1) / 2
    return rate, rate - np.log2(np.where(active, tradeoff * squared, 1.0)).sum(-1) / 2


def noisy_copy(covariance: ArrayLike, dim_x: int, noise: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(I(X; T), I(T; Y)) in bits [...] of T = X + independent Gaussian noise with the covariances noise [..., dx, dx].

    x and y are Gaussian with joint covariance [dx + dy, dx + dy], x first. No such T lies above `gaussian_bottleneck`.
    """
    matrix = np.asarray(covariance, dtype=np.float64)
    x, y, cross = matrix[:dim_x, :dim_x], matrix[dim_x:, dim_x:], matrix[:dim_x, dim_x:]
    added = np.asarray(noise, dtype=np.float64)
    variances = np.linalg.eigvalsh(added)
    if not (variances > 0).all():
        raise EstimatorError("a copy without noise tells everything: pass covariances of noise in all directions")
    received = np.linalg.slogdet(x + added)[1]
    given_y = np.linalg.slogdet(x - cross @ np.linalg.solve(y, cross.T) + added)[1]
    return (received - np.log(variances).sum(-1)) / 2 / log(2), (received - given_y) / 2 / log(2)


def reverse_water_filling(variances: ArrayLike, distortion: float) -> tuple[float, float]:
    """(rate in bits, water level) of a Gaussian with these variances at this total squared error (Cover & Thomas 10.3.3).

    Each component gets 1/2 log2 (variance / level), or nothing if its variance lies below the level.
    """
    spectrum = np.sort(np.asarray(variances, dtype=np.float64))  # [d]
    if not (distortion > 0 and spectrum.size and spectrum.min() >= 0 and np.isfinite(spectrum).all()):
        raise EstimatorError("reverse water-filling needs a positive distortion and finite variances, none negative")
    if distortion >= spectrum.sum():
        return 0.0, float(spectrum[-1])
    below = np.concatenate([[0.0], np.cumsum(spectrum)[:-1]])  # spent on the components under the level
    levels = (distortion - below) / np.arange(len(spectrum), 0, -1)  # if all but the first i components are above it
    first = int(np.argmax(levels < spectrum))
    return float(np.log2(spectrum[first:] / levels[first]).sum() / 2), float(levels[first])


def shannon_lower_bound(entropy_bits: float, distortion: float, dim: int = 1) -> float:
    """Least rate in bits of any source of `dim` components with this differential entropy, at this total squared error.

    h - d/2 log2 (2 pi e D / d) (Shannon 1959): the only floor that a non-Gaussian source may not cross. May be negative.
    """
    if not distortion > 0:
        raise EstimatorError("the Shannon lower bound needs a positive distortion")
    return entropy_bits - dim / 2 * log2(2 * pi * e * distortion / dim)
