"""What a view of few dimensions shows: as I(X; Y) >= I(f(X); g(Y)), the information of two scalars bounds that of x and y.

Views are the scalars themselves, distances from the centre, and the functions of x and of y that correlate most: found in one
half of the documents among random sines (Lopez-Paz, Hennig & Schoelkopf 2013, arXiv 1304.7717), and seen in the other half. What
two scalars share is that of the cells of a grid of equal shares, which is a view too.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ib_analysis.estimators.order import as_given, runs

CELLS = 32  # of the finest grid, in each direction
SAMPLES_PER_CELL = 8
MIN_SAMPLES = 128  # below, even a grid of 4 x 4 shows little
DEVIATIONS = 2.0  # that are subtracted from what is seen
SINES = 48  # half of them of a single column
FREQUENCIES = (0.5, 8.0)  # of normal scores, in radians
VARIATES = 2
ITERATIONS = 6  # toward the largest correlations, several times as fast as all singular values


def seen_nats(x: Tensor, y: Tensor, documents: NDArray[np.int64]) -> Tensor:
    """Nats [H], at least 0, that x [H, N, dx] and y [H, N, dy] share for sure; their columns on one scale, as normal scores."""
    least = x.new_zeros(x.shape[0])
    if x.shape[1] < MIN_SAMPLES:
        return least
    whole = len(np.unique(documents)) == len(documents)
    views = [(torch.linalg.vector_norm(x, dim=-1), torch.linalg.vector_norm(y, dim=-1))]
    if x.shape[-1] == y.shape[-1] == 1:
        views.append((x[..., 0], y[..., 0]))
    elif x.shape[1] >= 2 * MIN_SAMPLES:
        first, second = (torch.as_tensor(rows, device=x.device) for rows in _halves(documents))
        of_x, of_y = _correlated(_features(x, 0), _features(y, 1), first)
        views += [(of_x[:, second, k], of_y[:, second, k]) for k in range(of_x.shape[-1])]
    for u, v in views:
        least = torch.maximum(least, grid_nats(u, v, independent=whole))
    return least


def grid_nats(u: Tensor, v: Tensor, independent: bool = True) -> Tensor:
    """Nats [H] that scalars u and v [H, N] share for sure: the most that a grid shows, less bias and two standard errors.

    Where samples are not independent, the bias is at least what u and v half of the samples apart, of other documents, show.
    """
    count = u.shape[-1]
    places = [_place(values, CELLS) for values in (u, v)]
    pairs = [(places[0], places[1])] if independent else [(places[0], places[1]), (places[0], places[1].roll(count // 2, -1))]
    tables = [_table(*pair) for pair in pairs]
    found = []
    for down in (1, 2, 4, 8):
        for across in (1, 2, 4, 8):
            if (CELLS // down) * (CELLS // across) * SAMPLES_PER_CELL <= count:
                nats, bias, error = _of_table(_coarser(tables[0], down, across))
                if not independent:
                    bias = bias.maximum(_of_table(_coarser(tables[1], down, across))[0])
                found.append(nats - bias - DEVIATIONS * error)
    return torch.stack(found).amax(0)


def negentropy_nats(values: Tensor) -> Tensor:
    """By how much columns of values [H, N, d], of mean 0 and variance 1, are unlike a normal one: [H], the sum over columns of the
    divergence of cells that would be equally probable; at least 0 but for luck."""
    count, dim = values.shape[-2:]
    cells = _cells_of_one(count)
    place = (torch.special.ndtr(values) * cells).long().clamp(max=cells - 1)
    column = torch.arange(dim, device=values.device) * cells
    table = values.new_zeros(values.shape[0], dim * cells)
    table.scatter_add_(1, (place + column).flatten(1), torch.ones_like(values).flatten(1))
    share = table.unflatten(1, (dim, cells)) / count
    return (torch.xlogy(share, share * cells).sum(-1) - (cells - 1) / (2 * count)).sum(-1)


def negentropy_deviation_nats(count: int, dim: int) -> float:
    """The standard deviation of `negentropy_nats` of so many normal samples and columns."""
    return (dim * (_cells_of_one(count) - 1) / 2) ** 0.5 / count


def _cells_of_one(count: int) -> int:
    return min(CELLS, max(2, count // SAMPLES_PER_CELL))


def _place(values: Tensor, cells: int) -> Tensor:
    """The cell [H, N] of each value [H, N], cells holding equal shares; equal values share one."""
    order, less, _ = runs(values[..., None])
    return as_given(order, less * cells // values.shape[-1])[..., 0]


def _table(u: Tensor, v: Tensor) -> Tensor:
    """How many samples of places u and v [H, N] fall in each cell [H, CELLS, CELLS]."""
    table = torch.zeros(u.shape[0], CELLS * CELLS, dtype=torch.float64, device=u.device)
    table.scatter_add_(1, u * CELLS + v, torch.ones(u.shape, dtype=torch.float64, device=u.device))
    return table.unflatten(1, (CELLS, CELLS))


def _coarser(table: Tensor, down: int, across: int) -> Tensor:
    return table.unflatten(2, (-1, across)).sum(-1).unflatten(1, (-1, down)).sum(2)


def _of_table(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nats of a contingency table [H, R, C], their bias (Miller 1955) and their standard error: [H] each."""
    count = table.sum((1, 2), keepdim=True)
    share = table / count
    rows, columns = share.sum(2, keepdim=True), share.sum(1, keepdim=True)
    ratio = (share / (rows * columns)).log().where(share > 0, 0)
    nats = (share * ratio).sum((1, 2))
    freedom = ((rows > 0).sum((1, 2)) - 1) * ((columns > 0).sum((1, 2)) - 1)
    size = count[:, 0, 0]
    variance = ((share * ratio.square()).sum((1, 2)) - nats.square()).clamp(min=0) / size + freedom / 2 / size.square()
    return nats, freedom / 2 / size, variance.sqrt()


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
    weight *= np.exp(rng.uniform(*np.log(FREQUENCIES), SINES)) / np.linalg.norm(weight, axis=0)
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
