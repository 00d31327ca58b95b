"""Kinds of pairs whose density is known, so that the information is the mean of log p(x, y) / p(x) p(y).

Mixtures of normals as in Czyż et al. 2023 ("On the properties and estimation of pointwise mutual information profiles",
arXiv 2310.10240); cells, rings and channels are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp
from scipy.stats import multivariate_normal

from ib_analysis.estimators.known_information import Floats, KnownTask, student

GRID = 2001  # points of a channel's input and of its output that its information is summed over


def _log_density(z: Floats, weights: Floats, means: Floats, covariances: Floats) -> Floats:
    """Log density [N] of a mixture of normals with weights [C], means [C, d] and covariances [C, d, d]."""
    parts = [
        np.log(weight) + np.atleast_1d(multivariate_normal.logpdf(z, mean, covariance))
        for weight, mean, covariance in zip(weights, means, covariances)
    ]
    return np.asarray(logsumexp(parts, axis=0), dtype=np.float64)


def _drawn(
    weights: Floats, means: Floats, covariances: Floats, count: int, rng: np.random.Generator
) -> tuple[Floats, NDArray[np.int64]]:
    """Samples [N, d] of a mixture, and the component [N] of each."""
    component = rng.choice(len(weights), count, p=weights)
    factors = np.linalg.cholesky(covariances)
    noise = rng.standard_normal((count, means.shape[1]))
    return means[component] + np.einsum("nij,nj->ni", factors[component], noise), component


def normals(name: str, bits: float, dim_x: int, means: Floats, covariances: Floats, weights: Floats | None = None) -> KnownTask:
    """A mixture of normals over (x, y): means [C, D], covariances [C, D, D] or [D, D] of all, weights [C] equal by default."""
    means = np.asarray(means, dtype=np.float64)
    count, dim = means.shape
    every = np.broadcast_to(covariances, (count, dim, dim))
    share = np.full(count, 1 / count) if weights is None else np.asarray(weights, dtype=np.float64)

    def sample(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        z, _ = _drawn(share, means, every, count, rng)
        return z[:, :dim_x], z[:, dim_x:]

    def log_ratio(x: Floats, y: Floats) -> Floats:
        of_x = _log_density(x, share, means[:, :dim_x], every[:, :dim_x, :dim_x])
        of_y = _log_density(y, share, means[:, dim_x:], every[:, dim_x:, dim_x:])
        return _log_density(np.concatenate([x, y], axis=1), share, means, every) - of_x - of_y

    return KnownTask(name, bits, sample, log_ratio)


def labels(name: str, bits: float, means: Floats, covariances: Floats, classes: Sequence[int]) -> KnownTask:
    """x is of a mixture of equal normals, means [C, d], and y the class of its component, from `classes` [C]."""
    means = np.asarray(means, dtype=np.float64)
    count, dim = means.shape
    every, share = np.broadcast_to(covariances, (count, dim, dim)), np.full(count, 1 / count)
    of = np.asarray(classes)

    def sample(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        x, component = _drawn(share, means, every, count, rng)
        return x, of[component, None].astype(np.float64)

    def log_ratio(x: Floats, y: Floats) -> Floats:
        ratio = -_log_density(x, share, means, every)
        for label in np.unique(of):
            rows, own = y[:, 0] == label, of == label
            ratio[rows] += _log_density(x[rows], share[own] / share[own].sum(), means[own], every[own])
        return ratio

    return KnownTask(name, bits, sample, log_ratio)


def cells(name: str, full: Sequence[str]) -> KnownTask:
    """Uniform on those cells of a square of m x m that are marked # in m words, a letter say.

    I = mean over the n full cells of log [n / (full in its row) (full in its column)].
    """
    marked = np.array([[mark == "#" for mark in row] for row in full])
    places, size = np.argwhere(marked), len(full)
    with np.errstate(divide="ignore"):
        ratios = np.log(marked * len(places) / marked.sum(1)[:, None] / marked.sum(0))
    nats = float(ratios[marked].mean())

    def sample(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        z = (places[rng.integers(len(places), size=count)] + rng.random((count, 2))) / size
        return z[:, :1], z[:, 1:]

    def log_ratio(x: Floats, y: Floats) -> Floats:
        return np.asarray(ratios[(x[:, 0] * size).astype(int), (y[:, 0] * size).astype(int)])

    return KnownTask(name, nats / log(2), sample, log_ratio)


def ring(name: str, width: float, turns: int = 1) -> KnownTask:
    """x uniform on [0, 1], y = turns x + u modulo 1 with u uniform on [0, width]: uniform margins, I = -log width."""

    def sample(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        x = rng.random((count, 1))
        return x, (turns * x + width * rng.random((count, 1))) % 1

    def log_ratio(x: Floats, y: Floats) -> Floats:
        return np.where((y - turns * x)[:, 0] % 1 <= width, -log(width), -np.inf)

    return KnownTask(name, -log(width) / log(2), sample, log_ratio)


def channel(name: str, mean: Callable[[Floats], Floats], deviation: Callable[[Floats], Floats], copies: int = 1) -> KnownTask:
    """x uniform on [-1, 1], y normal with a mean and a deviation that depend on x; `copies` independent such pairs.

    The information, h(y) - E log deviation(x) - log(2 pi e) / 2, is summed over a grid.
    """
    inputs = (np.arange(GRID) + 0.5) / GRID * 2 - 1
    means, deviations = mean(inputs), deviation(inputs)
    reach = 8 * deviations.max()
    outputs = np.linspace(means.min() - reach, means.max() + reach, GRID)

    def log_density(y: Floats) -> Floats:
        z = (y[:, None] - means) / deviations
        return np.log(np.maximum(np.mean(np.exp(-(z**2) / 2) / deviations, axis=1), 1e-300)) - log(2 * np.pi) / 2

    at = log_density(outputs)
    entropy = -np.sum(np.exp(at) * at) * (outputs[1] - outputs[0])
    nats = copies * (entropy - np.mean(np.log(deviations)) - log(2 * np.pi * np.e) / 2)

    def sample(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        x = rng.uniform(-1, 1, (count, copies))
        return x, mean(x) + deviation(x) * rng.standard_normal((count, copies))

    def log_ratio(x: Floats, y: Floats) -> Floats:
        spread = deviation(x)
        given = -(((y - mean(x)) / spread) ** 2) / 2 - np.log(spread) - log(2 * np.pi) / 2
        return np.sum(given, axis=1) - np.interp(y, outputs, at).sum(1)

    return KnownTask(name, nats / log(2), sample, log_ratio)


def correlated_student(name: str, dim: int, freedom: int, correlation: float) -> KnownTask:
    """Student t whose coordinates correlate pairwise: the information of the normals plus that of the shared scale."""
    shared = student(dim, freedom)
    bits = shared.information_bits - dim * log(1 - correlation**2) / 2 / log(2)
    rest = (1 - correlation**2) ** 0.5

    def sample(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        x, y = shared.sample(count, rng)
        return x, correlation * x + rest * y

    def density(squared: Floats, size: int) -> Floats:
        half = (freedom + size) / 2
        norm = gammaln(half) - gammaln(freedom / 2) - size / 2 * log(freedom * np.pi)
        return np.asarray(norm - half * np.log1p(squared / freedom))

    def log_ratio(x: Floats, y: Floats) -> Floats:
        of_x, of_y = (np.square(values).sum(1) for values in (x, y))
        both = of_x + (np.square(y - correlation * x) / rest**2).sum(1)
        return density(both, 2 * dim) - dim * log(rest) - density(of_x, dim) - density(of_y, dim)

    return KnownTask(name, bits, sample, log_ratio)


def erased(name: str, base: KnownTask, lost: float) -> KnownTask:
    """y is 0 with probability `lost`, whatever x is: (1 - lost) of the information of a continuous base remains."""

    def sample(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        x, y = base.sample(count, rng)
        return x, np.where(rng.random((count, 1)) < lost, 0.0, y)

    return KnownTask(name, (1 - lost) * base.information_bits, sample)


def embedded(name: str, base: KnownTask, add_x: int, add_y: int, seed: int = 0) -> KnownTask:
    """So many independent normal columns are added, and all of a side are turned by a random rotation: nothing changes."""
    turns: dict[int, Floats] = {}

    def turned(values: Floats, add: int, side: int, rng: np.random.Generator) -> Floats:
        z = np.concatenate([values, rng.standard_normal((len(values), add))], axis=1)
        if side not in turns:
            turns[side] = np.linalg.qr(np.random.default_rng([seed, side]).standard_normal((z.shape[1],) * 2))[0]
        return z @ turns[side]

    def sample(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        x, y = base.sample(count, rng)
        return turned(x, add_x, 0, rng), turned(y, add_y, 1, rng)

    return KnownTask(name, base.information_bits, sample)


def counts(name: str, rate: Callable[[Floats], Floats]) -> KnownTask:
    """x uniform on [-1, 1], y a Poisson count of rate(x)."""
    inputs = (np.arange(GRID) + 0.5) / GRID * 2 - 1
    number = np.arange(400)[:, None]
    log_p = number * np.log(rate(inputs)) - rate(inputs) - gammaln(number + 1)  # [400, GRID]
    of_y = logsumexp(log_p, axis=1) - log(GRID)
    nats = float(np.sum(np.exp(log_p) * (log_p - of_y[:, None])) / GRID)

    def sample(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        x = rng.uniform(-1, 1, (count, 1))
        return x, rng.poisson(rate(x)).astype(np.float64)

    def log_ratio(x: Floats, y: Floats) -> Floats:
        seen = y[:, 0].astype(int)
        mean = rate(x[:, 0])
        return np.asarray(seen * np.log(mean) - mean - gammaln(seen + 1) - of_y[seen])

    return KnownTask(name, nats / log(2), sample, log_ratio)
