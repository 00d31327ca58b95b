"""Lower bounds on information from a trained critic, which scores how well x and y go together.

The critic is f(x) . g(y) + a(x) + b(y), from two networks with two hidden layers and a linear bypass. Half of the documents
train it, a quarter says when to stop, and the last quarter is measured: it has had no say, so its mean is a lower bound up to
luck. Critics of all heads are trained at once, and with them critics that see only half and a quarter of the training samples:
if these do worse, more samples would do better, and the estimate has not converged. Nor has one whose critic never beat its
start, at which all scores are 0: x and y may be independent, or training may have failed. A critic that is too weak for what it
is to see never moves either: so its bound is compared with a second opinion, and in few dimensions with KSG.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log, log2

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import relu

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators.bootstrap import bootstrap_interval
from ib_analysis.estimators.copula import normal_scores
from ib_analysis.estimators.estimate import (
    CONTRADICTED,
    NOT_CONVERGED,
    SATURATED,
    SATURATED_SHARE,
    Estimate,
    drifts,
    limited,
)
from ib_analysis.estimators.ksg import KSG, TREE_DIMENSIONS, information_nats
from ib_analysis.estimators.samples import Samples, standardized
from ib_analysis.estimators.second_opinion import contradicted

HIDDEN = 32
EMBEDDING = 8
BATCH = 256
LEARNING_RATE = 5e-3
WEIGHT_DECAY = 0.3
MAX_STEPS = 2000
STEPS_PER_CHECK = 50
PATIENCE = 8  # checks without a better bound
MAX_LATE_NATS = 0.005  # that the bound may have gained in the last so many checks
MIN_SAMPLES = 64
MIN_DOCUMENTS = 8
RATE = 0.5  # a bound from N training samples is assumed to lack N^-0.5
PARTS = (1, 2, 4)  # critics of a head are trained on all training samples, on half of them, on a quarter

Contributions = Callable[[Tensor], Tensor]  # of scores [..., B, B], pairs on the diagonal: nats [..., B] whose mean is the bound
Pair = tuple[Tensor, Tensor]  # x [H, N, dx] and y [H, N, dy]


def lower_bound(samples: Samples, contributions: Contributions) -> Estimate:
    """The estimate from a bound; its interval is that of the bound with the critic that was found."""
    if samples.count < MIN_SAMPLES or samples.documents_count < MIN_DOCUMENTS:
        raise EstimatorError(
            f"{samples.count} samples of {samples.documents_count} documents are too few to train on some and measure others: "
            f"pass at least {MIN_SAMPLES} samples of {MIN_DOCUMENTS} documents"
        )
    x, y = (standardized(values).float().reshape(-1, *values.shape[-2:]) for values in (samples.x, samples.y))
    train, stop, last = (torch.as_tensor(rows, device=x.device) for rows in _split(samples.documents))
    critics = _Critics(len(PARTS) * len(x), samples.dim_x, samples.dim_y, x.device)
    stopped = _train(critics, contributions, (x[:, train], y[:, train]), _repeated((x[:, stop], y[:, stop])))
    nats = critics.contributions(contributions, _repeated((x[:, last], y[:, last]))).double()
    bits = nats.reshape(len(PARTS), *samples.x.shape[:-2], -1) / log(2)  # [parts, ..., M]
    whole, halves, quarters = bits.mean(-1)
    used = last[: bits.shape[-1]].cpu().numpy()
    documents = np.unique(samples.documents[used], return_inverse=True)[1]
    low, high = bootstrap_interval(whole, bits[0], documents)
    least_step, most_step = bootstrap_interval(whole - halves, bits[0] - bits[1], documents)
    drift = drifts(whole, halves, quarters, (most_step - least_step) / 2, rate=RATE)
    ceiling = log2(min(BATCH, len(last)))
    flags = {
        SATURATED: whole > SATURATED_SHARE * ceiling,
        NOT_CONVERGED: drift | ~stopped.reshape(len(PARTS), *whole.shape)[0],
        CONTRADICTED: contradicted(samples, whole, _of_neighbours_bits(samples).to(whole.device)),
    }
    return limited(samples, whole, low, high, flags)


def _of_neighbours_bits(samples: Samples) -> Tensor:
    """What KSG sees of ranks [...] in dimensions so few that it is right, or too low; 0 in more, and where it declines."""
    shape = samples.x.shape[:-2]
    if samples.dim_x + samples.dim_y > TREE_DIMENSIONS:
        return samples.x.new_zeros(shape)
    heads = zip(*(normal_scores(values).reshape(-1, *values.shape[-2:]) for values in (samples.x, samples.y)))
    return samples.x.new_tensor([_or_zero(*head) for head in heads]).reshape(shape) / log(2)


def _or_zero(x: Tensor, y: Tensor) -> float:
    try:
        return information_nats(x, y, KSG().neighbours)
    except EstimatorError:  # of equal samples
        return 0.0


def _repeated(pair: Pair) -> Pair:
    """The same samples for the critics of each part: [parts * H, N, d]."""
    return pair[0].repeat(len(PARTS), 1, 1), pair[1].repeat(len(PARTS), 1, 1)


def _batch(train: Pair, generator: torch.Generator) -> Pair:
    """Random training samples [parts * H, B, d], for each critic among those that it may see."""
    count = train[0].shape[1]
    rows = [torch.randperm(count // part, generator=generator)[:BATCH].to(train[0].device) for part in PARTS]
    fewest = min(len(row) for row in rows)
    x, y = (torch.cat([values[:, row[:fewest]] for row in rows]) for values in train)
    return x, y


class _Critics:
    """H critics."""

    def __init__(self, heads: int, dim_x: int, dim_y: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def weight(rows: int, columns: int) -> Tensor:
            return torch.randn(heads, rows, columns, generator=generator) / rows**0.5

        def network(dim: int) -> list[Tensor]:
            weights = [weight(dim, HIDDEN), weight(HIDDEN, HIDDEN), weight(HIDDEN, EMBEDDING + 1), weight(dim, EMBEDDING + 1)]
            return weights + [torch.zeros(heads, 1, width) for width in (HIDDEN, HIDDEN, EMBEDDING + 1)]

        self.x, self.y = network(dim_x), network(dim_y)
        for last in (2, 3):  # all scores start at 0, the best of independent variables
            self.x[last][..., -1] = 0
            self.y[last].zero_()
        self.x, self.y = ([tensor.to(device).requires_grad_() for tensor in part] for part in (self.x, self.y))

    @property
    def parameters(self) -> list[Tensor]:
        return self.x + self.y

    def scores(self, pair: Pair) -> Tensor:
        """Scores [H, B, B] of each x [H, B, dx] with each y [H, B, dy]."""
        f, g = (_embedded(network, values) for network, values in zip((self.x, self.y), pair))
        return f[..., :-1] @ g[..., :-1].mT / EMBEDDING**0.5 + f[..., -1:] + g[..., -1:].mT

    @torch.no_grad()
    def contributions(self, contributions: Contributions, pair: Pair) -> Tensor:
        """Contributions [H, M] in batches; samples that do not fill the last batch are left out."""
        starts = range(0, max(1, pair[0].shape[1] // BATCH) * BATCH, BATCH)
        batches = [(pair[0][:, start : start + BATCH], pair[1][:, start : start + BATCH]) for start in starts]
        return torch.cat([contributions(self.scores(batch)) for batch in batches], dim=1)


def _embedded(parameters: list[Tensor], values: Tensor) -> Tensor:
    """f [H, N, E] and a [H, N, 1], joined."""
    first, second, last, bypass, first_bias, second_bias, last_bias = parameters
    hidden = relu(torch.baddbmm(first_bias, values, first))
    hidden = relu(torch.baddbmm(second_bias, hidden, second))
    return torch.baddbmm(torch.baddbmm(last_bias, hidden, last), values, bypass)


def _train(critics: _Critics, contributions: Contributions, train: Pair, stop: Pair) -> Tensor:
    """Leaves the parameters that were best on the stopping samples; returns which improved and had then all but stopped [H]."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(critics.parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best = critics.contributions(contributions, stop).mean(-1)  # [H]
    kept = [parameter.detach().clone() for parameter in critics.parameters]
    waited, improved = torch.zeros_like(best), torch.zeros_like(best, dtype=torch.bool)
    course = [best]
    for step in range(1, MAX_STEPS + 1):
        bound = contributions(critics.scores(_batch(train, generator))).mean(-1)  # [H]
        optimizer.zero_grad()
        (-bound.sum()).backward()
        optimizer.step()
        if step % STEPS_PER_CHECK == 0:
            now = critics.contributions(contributions, stop).mean(-1)
            better = now > best
            improved |= better
            best, waited = torch.where(better, now, best), torch.where(better, 0, waited + 1)
            course.append(best)
            for parameter, old in zip(critics.parameters, kept):
                old[better] = parameter.detach()[better]
            if (waited >= PATIENCE).all():
                break
    for parameter, old in zip(critics.parameters, kept):
        parameter.data.copy_(old)
    return (best - course[-1 - PATIENCE] <= MAX_LATE_NATS) & improved


def _split(documents: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Samples of a random half of the documents, of a quarter and of another quarter; each in random order."""
    rng = np.random.default_rng(0)
    count = int(documents.max()) + 1
    part = np.empty(count, dtype=np.int64)
    part[rng.permutation(count)] = np.arange(count) % 4
    return [rng.permutation(np.flatnonzero(np.isin(part[documents], parts))) for parts in ((0, 1), (2,), (3,))]


def exponential_pairs(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means of e^s over the others, for each x [..., B] and each y [..., B], and over all pairs [..., 1]; scores [..., B, B]."""
    count = scores.shape[-1]
    itself = torch.eye(count, dtype=torch.bool, device=scores.device)
    exponential = scores.masked_fill(itself, -torch.inf).exp()
    of_x, of_y = exponential.sum(-1) / (count - 1), exponential.sum(-2) / (count - 1)
    return of_x, of_y, of_x.mean(-1, keepdim=True)
