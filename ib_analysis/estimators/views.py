"""What a view of few dimensions shows: as I(X; Y) >= I(f(X); g(Y)), the information of two scalars bounds that of x and y.

Views are the scalars themselves, distances from the centre, and the functions of x and of y that correlate most: found in one
half of the documents among random sines (Lopez-Paz, Hennig & Schoelkopf 2013, arXiv 1304.7717), and seen in the other half. What
two scalars share is that of the cells of a grid of equal shares, which is a view too.
"""

from __future__ import annotations

from math import log

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ib_analysis.estimators.order import as_given, runs

CELLS = 32  # of the finest grid, in each direction
SAMPLES_PER_CELL = 8
COARSER = (1, 2, 4, 8)  # grids: so many cells are merged
MIN_DOCUMENTS = 256  # of which half see; fewer show little even on a grid of 4 x 4
DEVIATIONS = 2.0  # that are subtracted from what is seen
SINES = 48  # half of them of a single column
FREQUENCIES = (0.5, 8.0)  # of normal scores, in radians
VARIATES = 2
ITERATIONS = 6  # toward the largest correlations, several times as fast as all singular values


def seen_nats(x: Tensor, y: Tensor, documents: NDArray[np.int64]) -> Tensor:
    """Nats [H], at least 0, that x [H, N, dx] and y [H, N, dy] share for sure; their columns on one scale, as normal scores."""
    least = x.new_zeros(x.shape[0])
    independent = len(np.unique(documents))
    if independent < MIN_DOCUMENTS:
        return least
    least = least.maximum(grid_nats(torch.linalg.vector_norm(x, dim=-1), torch.linalg.vector_norm(y, dim=-1), independent))
    if x.shape[-1] == y.shape[-1] == 1:
        return least.maximum(grid_nats(x[..., 0], y[..., 0], independent))
    first, second = (torch.as_tensor(rows, device=x.device) for rows in _halves(documents))
    of_x, of_y = (values[:, second] for values in _correlated(_features(x, 0), _features(y, 1), first))
    for u, v in zip(of_x.unbind(-1), of_y.unbind(-1)):
        least = least.maximum(grid_nats(u, v, independent // 2))
    return least


def grid_nats(u: Tensor, v: Tensor, independent: int) -> Tensor:
    """Nats [H] that scalars u and v [H, N] share for sure: the most that a grid shows, less bias and two standard errors.

    Bias and error are those of `independent` samples: the number of documents, as tokens of one may all be alike.
    """
    table = _table(_place(u), _place(v))
    found = [torch.zeros(len(u), dtype=torch.float64, device=u.device)]
    for down in COARSER:
        for across in COARSER:
            if (CELLS // down) * (CELLS // across) * SAMPLES_PER_CELL <= independent:
                nats, bias, error = _of_table(
                    table.unflatten(2, (-1, across)).sum(-1).unflatten(1, (-1, down)).sum(2), independent
                )
                found.append(nats - bias - DEVIATIONS * error)
    return torch.stack(found).amax(0)


def negentropy_nats(values: Tensor, independent: int) -> Tensor:
    """By how much columns of values [H, N, d], of mean 0 and variance 1, are unlike a normal one: [H], the sum over columns of
    the divergence of cells that would be equally probable; at least 0 but for luck."""
    count, dim = values.shape[-2:]
    cells = _cells_of_one(independent)
    place = (torch.special.ndtr(values) * cells).long().clamp(max=cells - 1)
    column = torch.arange(dim, device=values.device) * cells
    table = values.new_zeros(values.shape[0], dim * cells)
    table.scatter_add_(1, (place + column).flatten(1), torch.ones_like(values).flatten(1))
    share = table.unflatten(1, (dim, cells)) / count
    return (torch.xlogy(share, share * cells).sum(-1) - (cells - 1) / (2 * independent)).sum(-1)


def negentropy_deviation_nats(independent: int, dim: int) -> float:
    """The standard deviation of `negentropy_nats` of so many normal samples and columns."""
    return (dim * (_cells_of_one(independent) - 1) / 2) ** 0.5 / independent


def _cells_of_one(independent: int) -> int:
    return min(CELLS, max(2, independent // SAMPLES_PER_CELL))


def _place(values: Tensor) -> Tensor:
    """The cell [H, N] of each value [H, N], of CELLS that hold equal shares; equal values share one."""
    order, less, _ = runs(values[..., None])
    return as_given(order, less * CELLS // values.shape[-1])[..., 0]


def _table(u: Tensor, v: Tensor) -> Tensor:
    """How many samples of places u and v [H, N] fall in each cell [H, CELLS, CELLS]."""
    table = torch.zeros(u.shape[0], CELLS * CELLS, dtype=torch.float64, device=u.device)
    table.scatter_add_(1, u * CELLS + v, torch.ones(u.shape, dtype=torch.float64, device=u.device))
    return table.unflatten(1, (CELLS, CELLS))


def _of_table(table: Tensor, independent: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nats of a contingency table [H, R, C], their bias (Miller 1955) and their standard error: [H] each."""
    share = table / table.sum((1, 2), keepdim=True)
    rows, columns = share.sum(2, keepdim=True), share.sum(1, keepdim=True)
    ratio = (share / (rows * columns)).log().where(share > 0, 0)
    nats = (share * ratio).sum((1, 2))
    bias = ((rows > 0).sum((1, 2)) - 1) * ((columns > 0).sum((1, 2)) - 1) / 2 / independent
    variance = ((share * ratio.square()).sum((1, 2)) - nats.square()).clamp(min=0) / independent + bias / independent
    return nats, bias, variance.sqrt()


def _halves(documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples of a random half of the documents, and of the other."""
    names, number = np.unique(documents, return_inverse=True)
    first = (np.random.default_rng(0).permutation(len(names)) % 2 == 0)[number]
    return np.flatnonzero(first), np.flatnonzero(~first)


def _features(x: Tensor, seed: int) -> Tensor:
    """Columns, squares, norm and random sines [H, N, F] of x [H, N, d]."""
    dim = x.shape[-1]
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((dim, SINES))
    weight[:, ::2] = np.eye(dim)[:, rng.integers(dim, size=SINES // 2)]
    weight *= np.exp(rng.uniform(log(FREQUENCIES[0]), log(FREQUENCIES[1]), SINES)) / np.linalg.norm(weight, axis=0)
    phase = rng.uniform(0, 2 * np.pi, SINES)
    sines = (x @ torch.as_tensor(weight, device=x.device) + torch.as_tensor(phase, device=x.device)).sin()
    return torch.cat([x, x.square(), torch.linalg.vector_norm(x, dim=-1, keepdim=True), sines], dim=-1)


def _correlated(of_x: Tensor, of_y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The combinations [H, N, VARIATES] of features [H, N, F] that correlate most in some rows."""
    parts = []
    for features in (of_x, of_y):
        used = features[:, rows]
        centred = features - used.mean(1, keepdim=True)
        scaled = centred / centred[:, rows].square().mean(1, keepdim=True).sqrt().clamp(min=1e-9)
        seen = scaled[:, rows]
        covariance = seen.mT @ seen / len(rows)
        ridge = features.shape[-1] / (4 * len(rows))
        factor = torch.linalg.cholesky(
            covariance + ridge * torch.eye(features.shape[-1], dtype=features.dtype, device=features.device)
        )
        parts.append((scaled, factor))
    (x, factor_x), (y, factor_y) = parts
    cross = x[:, rows].mT @ y[:, rows] / len(rows)
    cross = torch.linalg.solve_triangular(factor_x, cross, upper=False)
    cross = torch.linalg.solve_triangular(factor_y, cross.mT, upper=False).mT
    right = torch.as_tensor(np.random.default_rng(0).standard_normal((cross.shape[-1], 2 * VARIATES)), device=x.device)
    for _ in range(ITERATIONS):
        left = torch.linalg.qr(cross @ right).Q
        right = torch.linalg.qr(cross.mT @ left).Q
    turn, _, turned = torch.linalg.svd(left.mT @ cross @ right)
    turn_x = torch.linalg.solve_triangular(factor_x.mT, (left @ turn)[..., :VARIATES], upper=True)
    turn_y = torch.linalg.solve_triangular(factor_y.mT, (right @ turned.mT)[..., :VARIATES], upper=True)
    return x @ turn_x, y @ turn_y
