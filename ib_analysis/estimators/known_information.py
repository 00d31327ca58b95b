"""Pairs of variables whose mutual information is known, to test estimators on.

Defined as in "Beyond Normal" (Czyż et al., NeurIPS 2023, arXiv 2306.11078) and its package benchmark-mi; the quantized
Gaussian is ours. No prompts: these tasks are for estimators, not for models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log, pi

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.special import gammaln, ndtr, psi
from scipy.stats import norm

from ib_analysis.estimators.quantizers import uniform

Floats = NDArray[np.float64]
Transform = Callable[[Floats], Floats]


@dataclass(frozen=True)
class KnownTask:
    """A sampler and the information in bits of what it draws: sample(N, rng) gives x [N, dx] and y [N, dy].

    log_ratio(x, y), where it is known, is log p(x, y) / p(x) p(y) in nats [N], whose mean is the information.
    """

    name: str
    information_bits: float
    sample: Callable[[int, np.random.Generator], tuple[Floats, Floats]]
    log_ratio: Callable[[Floats, Floats], Floats] | None = None


def multinormal(name: str, covariance: Floats, dim_x: int) -> KnownTask:
    """Gaussian x (the first dim_x coordinates) and y. Information: 1/2 log |Sigma_x| |Sigma_y| / |Sigma|."""
    factor = np.linalg.cholesky(covariance)
    blocks = covariance[:dim_x, :dim_x], covariance[dim_x:, dim_x:], covariance
    log_x, log_y, log_both = (np.linalg.slogdet(block)[1] for block in blocks)

    def sample(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        z = rng.standard_normal((count, len(covariance))) @ factor.T
        return z[:, :dim_x], z[:, dim_x:]

    return KnownTask(name, (log_x + log_y - log_both) / 2 / log(2), sample)


def normal(correlation: float = 0.75) -> KnownTask:
    """Two correlated normal scalars."""
    return multinormal(f"1v1 normal {correlation}", np.array([[1, correlation], [correlation, 1]]), 1)


def sparse(dim: int, correlation: float = 0.8, pairs: int = 2) -> KnownTask:
    """The first `pairs` coordinates of x and y correlate pairwise, all others are independent."""
    covariance = np.eye(2 * dim)
    first = np.arange(pairs)
    covariance[first, dim + first] = covariance[dim + first, first] = correlation
    return multinormal(f"multinormal sparse {dim}x{dim}", covariance, dim)


def dense(dim: int, correlation: float = 0.5) -> KnownTask:
    """All coordinates of x and y correlate."""
    covariance = np.full((2 * dim, 2 * dim), correlation) + (1 - correlation) * np.eye(2 * dim)
    return multinormal(f"multinormal dense {dim}x{dim}", covariance, dim)


def additive_uniform(noise: float = 0.1) -> KnownTask:
    """x uniform on [0, 1], y = x + uniform noise on [-noise, noise]."""

    def sample(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        x = rng.random((count, 1))
        return x, x + rng.uniform(-noise, noise, (count, 1))

    nats = 1 / (4 * noise) if noise > 0.5 else noise - log(2 * noise)
    return KnownTask(f"1v1 additive uniform {noise}", nats / log(2), sample)


def student(dim: int, freedom: int) -> KnownTask:
    """Student t with identity dispersion: uncorrelated, but all coordinates share one scale.

    Information from the entropies of Arellano-Valle, Contreras-Reyes & Genton (2013), equation 7.
    """

    def entropy(size: int) -> float:
        half = (freedom + size) / 2
        log_norm = gammaln(freedom / 2) - gammaln(half) + size / 2 * log(freedom * pi)
        return float(log_norm + half * (psi(half) - psi(freedom / 2)))

    def sample(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        scale = np.sqrt(rng.chisquare(freedom, (count, 1)) / freedom)
        z = rng.standard_normal((count, 2 * dim)) / scale
        return z[:, :dim], z[:, dim:]

    return KnownTask(f"student {dim}x{dim} df={freedom}", (2 * entropy(dim) - entropy(2 * dim)) / log(2), sample)


def transformed(name: str, base: KnownTask, map_x: Transform, map_y: Transform) -> KnownTask:
    """Invertible maps of x and of y leave the information as it is."""

    def sample(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        x, y = base.sample(count, rng)
        return map_x(x), map_y(y)

    return KnownTask(name, base.information_bits, sample)


def half_cube(base: KnownTask) -> KnownTask:
    """Every coordinate becomes x sqrt|x|: heavier tails."""

    def heavier(x: Floats) -> Floats:
        return x * np.sqrt(np.abs(x))

    return transformed(f"half-cube of {base.name}", base, heavier, heavier)


def asinh(base: KnownTask) -> KnownTask:
    """Every coordinate becomes asinh(x): lighter tails."""
    return transformed(f"asinh of {base.name}", base, np.arcsinh, np.arcsinh)


def swiss_roll(correlation: float = 0.75) -> KnownTask:
    """Uniform margins of two correlated normals; x is then rolled up in the plane."""

    def roll(x: Floats) -> Floats:
        t = 1.5 * pi * (1 + 2 * ndtr(x[:, 0]))
        return np.stack([t * np.cos(t), t * np.sin(t)], axis=1) / 21

    return transformed("swiss roll 2x1", normal(correlation), roll, ndtr)


def spiral(base: KnownTask, speed: float = 1 / 3) -> KnownTask:
    """Rotates x in its plane (0, 1) and y in its plane (1, 2), by speed * |x|^2 and speed * |y|^2."""

    def rotation(first: int, second: int) -> Transform:
        def rotate(x: Floats) -> Floats:
            angle = speed * np.square(x).sum(axis=1)
            rotated = x.copy()
            rotated[:, first] = np.cos(angle) * x[:, first] - np.sin(angle) * x[:, second]
            rotated[:, second] = np.sin(angle) * x[:, first] + np.cos(angle) * x[:, second]
            return rotated

        return rotate

    return transformed(f"spiral of {base.name}", base, rotation(0, 1), rotation(1, 2))


def quantized_gaussian(dim: int, bits: int, step: float, correlation: float = 1.0) -> KnownTask:
    """x is normal and y a rounded copy of a variable that correlates with it, coordinate by coordinate.

    Levels lie at (k + 1/2) step, as many as `bits` index. Known channel: P(level | x) is a difference of normal
    probabilities, so I = H(y) - H(y | x), and H(y | x) = 0 at correlation 1.
    """
    quantizer = uniform(bits, step)
    edges = np.concatenate([[-np.inf], quantizer.thresholds, [np.inf]])

    def entropy_bits(mean: float, deviation: float) -> float:
        p = np.diff(ndtr((edges - mean) / deviation))
        return float(-np.sum(p * np.log2(np.maximum(p, 1e-300))))

    def sample(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        x = rng.standard_normal((count, dim))
        copy = correlation * x
        if correlation < 1:
            copy = copy + np.sqrt(1 - correlation**2) * rng.standard_normal((count, dim))
        return x, quantizer.levels[np.digitize(copy, quantizer.thresholds)]

    given_x = 0.0
    if correlation < 1:
        deviation = np.sqrt(1 - correlation**2)
        given_x = quad(lambda x: norm.pdf(x) * entropy_bits(correlation * x, deviation), -9, 9, limit=500)[0]
    information = dim * (entropy_bits(0.0, 1.0) - given_x)
    return KnownTask(f"quantized gaussian {dim}x{dim} {bits} bit", information, sample)


KNOWN_TASKS: dict[str, KnownTask] = {
    task.name: task
    for task in (
        normal(),
        additive_uniform(),
        swiss_roll(),
        sparse(5),
        sparse(25),
        dense(25),
        dense(50),
        half_cube(sparse(25)),
        spiral(sparse(3)),
        student(5, 2),
        asinh(student(5, 2)),
        quantized_gaussian(1, bits=4, step=0.3352, correlation=0.9),
        quantized_gaussian(64, bits=4, step=0.8),
    )
}
