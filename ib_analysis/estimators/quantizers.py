"""Scalar quantizers of a standard normal variable: tables to compare measurements with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import log2, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.optimize import minimize_scalar, root
from scipy.special import ndtr, ndtri

REACH = 9.0  # deviations beyond which the normal density is neglected


@dataclass(frozen=True, eq=False)
class ScalarQuantizer:
    """K levels and the K - 1 thresholds between them, for a standard normal variable."""

    thresholds: NDArray[np.float64]
    levels: NDArray[np.float64]

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """Of each level [K]."""
        return np.diff(ndtr(self._edges))

    @property
    def entropy_bits(self) -> float:
        """Entropy of the index: the information that it holds, as it is a function of the variable."""
        return _entropy_bits(self.probabilities)

    @property
    def distortion(self) -> float:
        """Mean squared error."""
        return float(1 - 2 * self.levels @ _first_moments(self._edges) + self.levels**2 @ self.probabilities)

    @property
    def _edges(self) -> NDArray[np.float64]:
        return np.concatenate([[-np.inf], self.thresholds, [np.inf]])


def uniform(bits: int, step: float) -> ScalarQuantizer:
    """2**bits levels at odd multiples of step / 2; the outermost also stand for all beyond."""
    half = 2 ** (bits - 1)
    return ScalarQuantizer(step * np.arange(1 - half, half), step * (np.arange(-half, half) + 0.5))


@lru_cache
def optimal_uniform(bits: int) -> ScalarQuantizer:
    """The step of least distortion (Max 1960, table II)."""
    found = minimize_scalar(lambda step: uniform(bits, step).distortion, bounds=(1e-3, 2), options={"xatol": 1e-9})
    return uniform(bits, float(found.x))


@lru_cache
def lloyd_max(bits: int) -> ScalarQuantizer:
    """The levels of least distortion (Lloyd 1982; Max 1960, table I): each level the mean of its cell, thresholds halfway."""
    count = 2**bits

    def between(levels: NDArray[np.float64]) -> ScalarQuantizer:
        return ScalarQuantizer((levels[1:] + levels[:-1]) / 2, levels)

    def offsets(levels: NDArray[np.float64]) -> NDArray[np.float64]:
        quantizer = between(levels)
        return _first_moments(quantizer._edges) / quantizer.probabilities - levels

    start = sqrt(3) * ndtri((np.arange(count) + 0.5) / count)  # the best density of levels as their number grows
    return between(root(offsets, start, tol=1e-12).x)


def dithered_bits(step: float) -> float:
    """I(X; X + N) of normal X and uniform N of width `step`: the entropy of a dithered quantizer given its dither."""

    def integrand(sum_: float) -> float:
        density = (ndtr(sum_ + step / 2) - ndtr(sum_ - step / 2)) / step
        return float(-density * np.log2(density)) if density > 0 else 0.0

    reach = REACH + step / 2
    return 2 * quad(integrand, 0, reach, limit=500, epsabs=1e-12)[0] - log2(step)


def _entropy_bits(probabilities: NDArray[np.float64]) -> float:
    positive = probabilities[probabilities > 0]
    return float(-positive @ np.log2(positive))


def _first_moments(edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Integral of x times the normal density between neighbouring edges."""
    return -np.diff(np.exp(-(edges**2) / 2)) / sqrt(2 * np.pi)
