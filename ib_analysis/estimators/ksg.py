"""Information from distances to nearest neighbours (Kraskov, Stögbauer & Grassberger 2004, arXiv cond-mat/0305641)."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from numbers import Integral
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.special import digamma, stdtrit
from torch import Tensor

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators.bootstrap import LEVEL
from ib_analysis.estimators.copula import normal_scores
from ib_analysis.estimators.estimate import (
    CONTRADICTED,
    NOT_CONVERGED,
    ONE_SIDED,
    SATURATED,
    SATURATED_SHARE,
    Estimate,
    drifts,
    limited,
)
from ib_analysis.estimators.samples import Array, check_samples, standardized
from ib_analysis.estimators.second_opinion import contradicted

Floats: TypeAlias = "NDArray[np.float64]"
Counts: TypeAlias = "NDArray[np.int64]"

PARTS = 8  # disjoint parts of the documents, from which the interval comes
TREE_DIMENSIONS = 6  # of x and y together; in more, a tree is slower than looking at all pairs
ROWS = 16  # of the distance matrix at once: small enough for the processor's cache
UNSEEN_SHARE = 0.5  # of the samples: where the median sample has more within its radius on one side, that side is not seen
MIN_SQUARED_RADIUS = 1e-12  # of standardised samples; rounding blurs smaller ones


@dataclass(frozen=True)
class KSG:
    """The first estimator of the paper (equation 8): max-norm over x and y, Euclidean distance within each.

    psi(k) + psi(N) - E[psi(n_x + 1) + psi(n_y + 1)], where n counts samples nearer than the k-th neighbour. It cannot exceed
    psi(N) - psi(k), and is biased towards 0 in more than a few dimensions: a cross-check there. Time grows as N^2 in more
    than 6 dimensions. Columns are standardised first; where one side has many dimensions and the other few, or one far outlier,
    its distances decide alone, and a flag says so. So does one where the same estimate of ranks, or a second opinion, holds more,
    and one where the bias that is left, falling as N^(-1 / dimensions), exceeds 0.1 bits. A discrete side counts as its
    neighbours do (Ross 2014); pairs that repeat are refused. The interval comes from disjoint parts of the documents, drawn
    without replacement, as the variance falls with 1 / N (Holmes & Nemenman 2019, arXiv 1903.09280).
    """

    neighbours: int = 10
    name: ClassVar[str] = "ksg"

    def __post_init__(self) -> None:
        if not isinstance(self.neighbours, Integral) or self.neighbours < 1:
            raise EstimatorError(f"neighbours must be a whole number, at least 1, got {self.neighbours!r}")

    def estimate(self, x: Array, y: Array, documents: Array | None = None) -> Estimate:
        """See Estimator. Needs 8 documents with more than k samples each eighth, and no more than k equal pairs."""
        samples = check_samples(x, y, documents)
        shape = samples.x.shape[:-2]
        parts = _parts(samples.documents)
        if min(len(part) for part in parts) <= self.neighbours:
            raise EstimatorError(f"{samples.count} samples are too few: each of {PARTS} parts needs more than {self.neighbours}")
        heads = zip(*(standardized(values).reshape(-1, *values.shape[-2:]) for values in (samples.x, samples.y)))
        values = np.array([self._estimate_head(head_x, head_y, parts) for head_x, head_y in heads])
        *nats, largest = torch.as_tensor(values.T).reshape(6, *shape)
        bits, halves, quarters, error, of_ranks = (value / log(2) for value in nats)
        width = error * float(stdtrit(PARTS - 1, (1 + LEVEL) / 2))
        ceiling = float(digamma(samples.count) - digamma(self.neighbours)) / log(2)
        flags = {
            SATURATED: bits > SATURATED_SHARE * ceiling,
            NOT_CONVERGED: drifts(bits, halves, quarters, error, rate=1 / (samples.dim_x + samples.dim_y)),
            ONE_SIDED: largest > UNSEEN_SHARE,
            CONTRADICTED: contradicted(samples, bits.to(samples.x.device), of_ranks.to(samples.x.device)),
        }
        return limited(samples, bits, bits - width, bits + width, flags)

    def _estimate_head(self, x: Tensor, y: Tensor, parts: list[NDArray[np.int64]]) -> tuple[float, ...]:
        """Nats of all samples, means over halves and over quarters, the standard error, nats of the ranks, and on the side where
        it is larger the median share of other values that lie within the radius."""
        eighths, quarters, halves = (
            [information_nats(x[rows], y[rows], self.neighbours) for rows in _joined(parts, size)] for size in (1, 2, 4)
        )
        error = float(np.std(eighths, ddof=1)) / PARTS**0.5
        near = _counts(x, y, self.neighbours)
        largest = max(_share_of_others(*side) for side in zip(near, (x, y)))
        of_ranks = information_nats(normal_scores(x), normal_scores(y), self.neighbours)
        return _nats(*near, self.neighbours), float(np.mean(halves)), float(np.mean(quarters)), error, of_ranks, largest


def information_nats(x: Tensor, y: Tensor, neighbours: int) -> float:
    """The estimate from standardised x [N, dx] and y [N, dy]."""
    return _nats(*_counts(x, y, neighbours), neighbours)


def _nats(near_x: Counts, near_y: Counts, neighbours: int) -> float:
    return float(digamma(neighbours) + digamma(len(near_x)) - np.mean(digamma(near_x) + digamma(near_y)))


def _share_of_others(near: Counts, values: Tensor) -> float:
    """The median share of the samples values [N, d] unlike one's own that are among its near ones [N], itself included."""
    within = float(np.median(near))
    if within <= UNSEEN_SHARE * len(values):
        return within / len(values)
    _, which, counts = np.unique(values.cpu().numpy(), axis=0, return_inverse=True, return_counts=True)
    equal = float(np.median(counts[which.ravel()]))
    return (within - equal) / max(1.0, len(values) - equal)


def _counts(x: Tensor, y: Tensor, neighbours: int) -> tuple[Counts, Counts]:
    """How many samples, itself included, lie nearer in x, and in y, than the k-th neighbour of each: [N] each, in any order."""
    if x.shape[-1] + y.shape[-1] <= TREE_DIMENSIONS:
        return _counts_by_trees(x.cpu().numpy(), y.cpu().numpy(), neighbours)
    return _counts_by_pairs(x, y, neighbours)


def _counts_by_trees(x: Floats, y: Floats, neighbours: int) -> tuple[Counts, Counts]:
    radius = np.sqrt(_squared_radii(x, y, neighbours))
    _check_radius(float(radius.min()) ** 2, neighbours)
    radius = radius * (1 - 1e-9)  # or rounding would count the neighbour at the very radius
    return _nearer(x, radius), _nearer(y, radius)


def _squared_radii(x: Floats, y: Floats, neighbours: int) -> Floats:
    """Squared distance [N] to the k-th neighbour. A tree knows the max-norm over scalars, but not that over vectors: for
    these it proposes candidates by the Euclidean distance over x and y, at most sqrt(2) of ours, until no other can be nearer.
    """
    pairs = np.concatenate([x, y], axis=1)
    tree = cKDTree(pairs)
    rows = tree.indices  # in this order, what the tree reads for one is in the processor's cache for the next
    squared = np.empty(len(x))
    if pairs.shape[1] == 2:
        distance, _ = tree.query(pairs[rows], [neighbours + 1], p=np.inf)  # [rows, 1]; the first is itself
        squared[rows] = np.square(distance)[:, 0]
        return squared
    candidates = 3 * (neighbours + 1)
    while len(rows) > 0:
        candidates = min(candidates, len(x))
        distance, near = tree.query(pairs[rows], candidates)  # [rows, candidates]
        both = np.maximum(*(np.square(values.T[:, near] - values.T[:, rows, None]).sum(0) for values in (x, y)))
        squared[rows] = np.partition(both, neighbours, axis=1)[:, neighbours]
        rows = rows[2 * squared[rows] > np.square(distance)[:, -1]] if candidates < len(x) else rows[:0]
        candidates *= 2
    return squared


def _nearer(values: Floats, radius: Floats) -> Counts:
    """How many of values [N, d] lie within a radius [N] of each: [N], in any order."""
    if values.shape[1] > 1:
        return np.asarray(cKDTree(values).query_ball_point(values, radius, return_length=True))
    order = np.argsort(values[:, 0])
    ordered, reach = values[order, 0], radius[order]
    return np.searchsorted(ordered, ordered + reach, "left") - np.searchsorted(ordered, ordered - reach, "right")


def _counts_by_pairs(x: Tensor, y: Tensor, neighbours: int) -> tuple[Counts, Counts]:
    """From the distances of all pairs."""
    count = len(x)
    groups = int((count * (neighbours + 1)) ** 0.5)
    width = -(-count // groups) * groups
    left_x, right_x = _factors_of_squares(x, width)
    left_y, right_y = _factors_of_squares(y, width)
    squared_x, squared_y, both = (x.new_empty(ROWS, width) for _ in range(3))  # written again and again: new pages are slow
    near = x.new_empty(2, count)
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        used = slice(0, len(left_x[rows]))
        torch.mm(left_x[rows], right_x, out=squared_x[used])
        torch.mm(left_y[rows], right_y, out=squared_y[used])
        torch.maximum(squared_x[used], squared_y[used], out=both[used])
        radius = _smallest(both[used].view(-1, width // groups, groups), neighbours + 1)  # the first is itself
        _check_radius(float(radius.min()), neighbours)
        for squared, counts in zip((squared_x, squared_y), near):
            torch.sum(squared[used].lt_(radius), dim=-1, out=counts[rows])  # in place, as masks are slower
    near_x, near_y = near.long().cpu().numpy()
    return near_x, near_y


def _factors_of_squares(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """[N, d + 2] and [d + 2, width] whose product is the matrix of squared distances between samples x [N, d]; columns beyond
    N are infinite."""
    norms = x.square().sum(-1, keepdim=True)
    ones = torch.ones_like(norms)
    right = torch.cat([x, norms, ones], dim=1).T
    right = torch.nn.functional.pad(right, (0, width - len(x)))
    right[-2, len(x) :] = torch.inf
    return torch.cat([-2 * x, ones, norms], dim=1), right


def _smallest(values: Tensor, rank: int) -> Tensor:
    """The rank-th smallest [R, 1] of values [R, S, G] of each row: it is in one of the `rank` groups of least minima."""
    groups = values.amin(1).topk(rank, largest=False, sorted=False).indices  # [R, rank]
    candidates = values.gather(2, groups[:, None].expand(-1, values.shape[1], -1))  # [R, S, rank]
    return candidates.flatten(1).topk(rank, largest=False).values[:, -1:]


def _check_radius(squared: float, neighbours: int) -> None:
    if squared < MIN_SQUARED_RADIUS:
        raise EstimatorError(f"more than {neighbours} samples are equal: KSG needs continuous variables, see CodeEntropy")


def _parts(documents: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Samples of 8 disjoint random parts of the documents."""
    count = int(documents.max()) + 1
    if count < PARTS:
        raise EstimatorError(f"{count} documents are too few for an interval: pass at least {PARTS}")
    part = np.random.default_rng(0).permutation(count) % PARTS  # [documents]
    return [np.flatnonzero(part[documents] == number) for number in range(PARTS)]


def _joined(parts: list[NDArray[np.int64]], size: int) -> list[NDArray[np.int64]]:
    return [np.concatenate(parts[start : start + size]) for start in range(0, PARTS, size)]
