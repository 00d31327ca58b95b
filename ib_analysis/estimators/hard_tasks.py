"""Tasks of known information on which estimates look certain and may be wrong: two halves of the same families.

Checks were made with `SEEN` in view and then tried on `HELD_BACK`, whose constructions differ. Information of mixtures is the
mean of log p(x, y) / p(x) p(y) over 4 million draws, to .001 bits; that of all others is analytic or summed over a grid.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ib_analysis.estimators.known_densities import (
    cells,
    channel,
    correlated_student,
    counts,
    embedded,
    erased,
    labels,
    normals,
    ring,
)
from ib_analysis.estimators.known_information import (
    Floats,
    KnownTask,
    Transform,
    dense,
    half_cube,
    multinormal,
    normal,
    sparse,
    spiral,
    student,
    transformed,
)


def _constant(deviation: float) -> Callable[[Floats], Floats]:
    return lambda x: np.full_like(x, deviation)


def _waving(speed: float) -> Callable[[Floats], Floats]:
    return lambda x: np.sin(speed * x)


def _pairs(correlations: tuple[float, ...], scale: float = 1.0) -> Floats:
    """Covariance [2 d, 2 d] of coordinates that correlate pairwise."""
    diagonal = np.diag(correlations)
    one = np.eye(len(correlations))
    return scale * np.block([[one, diagonal], [diagonal, one]])


def _signs(dim: int) -> Floats:
    """All vectors of signs [2^dim, dim]."""
    return np.stack(np.meshgrid(*[[-1.0, 1.0]] * dim, indexing="ij"), -1).reshape(-1, dim)


def _on_circle(count: int, radius: float) -> Floats:
    angle = 2 * np.pi * np.arange(count) / count
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _lissajous(count: int) -> Floats:
    angle = 2 * np.pi * np.arange(count) / count
    return np.stack([np.cos(2 * angle), np.sin(3 * angle)], axis=1)


def _first(dim: int, means: Floats) -> Floats:
    """Means [C, d] in the first of `dim` coordinates."""
    return np.pad(means, ((0, 0), (0, dim - means.shape[1])))


def _copies(dim: int, noise: float, sides: int = 1) -> KnownTask:
    """y is a scalar (or `sides` of them), and x so many noisy copies of each of them, all from one more latent."""
    latent = np.eye(sides)
    of_x = np.kron(np.ones((dim, 1)), latent)  # [dim * sides, sides]
    factor = np.concatenate([of_x, latent])
    covariance = factor @ factor.T + np.diag([noise] * dim * sides + [noise] * sides)
    return multinormal(f"{dim * sides} noisy copies of {sides}, noise {noise}", covariance, dim * sides)


def _low_rank(dim_x: int, dim_y: int, rank: int, seed: int) -> KnownTask:
    loading = np.random.default_rng(seed).standard_normal((dim_x + dim_y, rank)) / rank**0.5
    return multinormal(f"low rank {dim_x}x{dim_y}", loading @ loading.T + np.eye(dim_x + dim_y), dim_x)


def _independent(name: str, x: Transform, y: Transform, dim: int) -> KnownTask:
    base = multinormal(name, np.eye(2 * dim), dim)
    return transformed(name, base, x, y)


def _sinh(x: Floats) -> Floats:
    return np.sinh(1.5 * x)


LETTER_Z = ("######", "....#.", "...#..", "..#...", ".#....", "######")
LETTER_H = ("#....#", "#....#", "######", "######", "#....#", "#....#")
BOARD = ("#.#.", ".#.#", "#.#.", ".#.#")
STRIPES = ("#..#..", ".#..#.", "..#..#", "#..#..", ".#..#.", "..#..#")
PERMUTED = ("..#..", "#....", "....#", ".#...", "...#.")
LATIN = ("##...", ".##..", "..##.", "...##", "#...#")

_SEEN = (
    cells("letter Z", LETTER_Z),
    cells("board of 4", BOARD),
    cells("five cells", PERMUTED),
    channel("waves of 4 periods", _waving(4 * np.pi), _constant(0.3)),
    channel("three pairs of waves", _waving(3 * np.pi), _constant(0.4), copies=3),
    embedded("waves among 4x4", channel("", _waving(2 * np.pi), _constant(0.3)), 3, 3),
    channel("spread that depends on x", lambda x: 0 * x, lambda x: np.exp(1.5 * x)),
    normals("eight normals on a ring", 0.3334, 1, _on_circle(8, 3.0), 0.5 * np.eye(2)),
    normals("cross of two correlations", 0.5893, 1, np.zeros((2, 2)), np.stack([_pairs((0.9,)), _pairs((-0.9,))])),
    student(3, 2),
    correlated_student("correlated student 3x3 df=3", 3, 3, 0.6),
    normals(
        "two scales 3x3",
        0.6395,
        3,
        np.zeros((2, 6)),
        np.stack([_pairs((0.0,) * 3), _pairs((0.0,) * 3, 25.0)]),
        np.array([0.7, 0.3]),
    ),
    normals(
        "parity of two signs",
        0.7655,
        2,
        np.concatenate([2 * _signs(2), 2 * _signs(2).prod(1, keepdims=True)], axis=1),
        np.eye(3),
    ),
    labels("three labels in the plane", 1.3021, _on_circle(3, 2.0), np.eye(2), (0, 1, 2)),
    labels("label against 20", 0.7604, _first(20, np.array([[-1.5], [1.5]])), np.eye(20), (0, 1)),
    labels("label of alternating lumps", 0.8086, np.array([[-3.0], [-1.0], [1.0], [3.0]]), 0.3 * np.eye(1), (0, 1, 0, 1)),
    labels(
        "label of normal kurtosis",
        1.1383,
        np.array([[-3.0], [-0.5], [0.0], [0.0], [0.5], [3.0]]),
        0.5 * np.eye(1),
        (-1, 0, 0, 0, 0, 1),
    ),
    erased("erased normal", normal(0.9), 0.4),
    counts("counts of an exponential rate", lambda x: np.exp(1 + 1.5 * x)),
    _copies(20, 0.5),
    spiral(dense(4)),
    half_cube(sparse(4)),
    transformed("normal 0.6 in other margins", normal(0.6), np.exp, _sinh),
    multinormal("normal 3x2", _pairs((0.7, 0.5, 0.2))[:5, :5], 3),
    sparse(12),
    sparse(4, correlation=0.9, pairs=4),
    student(8, 3),
    embedded("spread among 6x6", channel("", lambda x: 0 * x, lambda x: np.exp(2 * x)), 5, 5),
    _independent("independent heavy tails 3x3", lambda x: x**3, _sinh, 3),
    _independent("independent 8x8", lambda x: x, lambda x: x, 8),
)

_HELD_BACK = (
    cells("letter H", LETTER_H),
    cells("stripes of 6", STRIPES),
    cells("latin cells", LATIN),
    ring("ring of half width", 0.5),
    ring("ring of two turns", 0.3, turns=2),
    normals("lissajous", 0.6522, 1, 2 * _lissajous(40), 0.06 * np.eye(2)),
    embedded("lissajous among 3x5", normals("", 0.6522, 1, 2 * _lissajous(40), 0.06 * np.eye(2)), 2, 4),
    channel("two pairs of valleys", np.abs, _constant(0.12), copies=2),
    channel("spread and mean", lambda x: 2 * x**2, lambda x: 0.1 + 0.6 * np.abs(x)),
    normals(
        "three of other slopes",
        1.0073,
        1,
        np.array([[-2.0, 0.0], [0.0, 1.0], [2.0, 0.0]]),
        np.stack([_pairs((0.95,)), _pairs((0.0,)), _pairs((-0.95,))]),
    ),
    student(4, 2),
    student(2, 1),
    correlated_student("correlated student 2x2 df=2", 2, 2, 0.8),
    normals(
        "three scales 2x2", 0.9325, 2, np.zeros((3, 4)), np.stack([_pairs((0.3, 0.3), scale) for scale in (0.05, 1.0, 20.0)])
    ),
    normals("y of unknown sign 2x2", 1.0811, 2, np.zeros((2, 4)), np.stack([_pairs((0.85, 0.85)), _pairs((-0.85, -0.85))])),
    labels("parity of three signs", 0.8186, 1.5 * _signs(3), 0.5 * np.eye(3), tuple((_signs(3).prod(1) > 0).astype(int))),
    labels("five labels in the plane", 2.0296, _on_circle(5, 3.0), np.eye(2), (0, 1, 2, 3, 4)),
    labels("four labels against 40", 1.8254, _first(40, 2 * _signs(2)), np.eye(40), (0, 1, 2, 3)),
    erased("erased ring", ring("", 0.2), 0.25),
    counts("counts of a valley", lambda x: 1 + 30 * x**2),
    _copies(15, 1.0, sides=2),
    spiral(sparse(4, correlation=0.7, pairs=4), speed=0.5),
    half_cube(dense(6)),
    transformed("normal 0.8 in other margins", normal(0.8), lambda x: x**3, np.arctan),
    _low_rank(12, 8, 3, seed=7),
    multinormal("normal 2x2", _pairs((0.8, 0.4)), 2),
    _independent("independent 4x4 of unlike tails", lambda x: np.sign(x) * x**2, np.arctan, 4),
    _independent("independent 10x10", lambda x: x, np.exp, 10),
)

SEEN: dict[str, KnownTask] = {task.name: task for task in _SEEN}
HELD_BACK: dict[str, KnownTask] = {task.name: task for task in _HELD_BACK}
