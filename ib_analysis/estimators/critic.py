"""Lower bounds on information from a trained critic, which scores how well x and y go together.

The critic is f(x) . g(y) + a(x) + b(y), from two networks with two hidden layers and a linear bypass. All heads are trained at
once, each with its own critic. Half of the documents train it, a quarter says when to stop, and the last quarter is measured:
it has had no say, so its mean is a lower bound up to luck.
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
from ib_analysis.estimators.estimate import NOT_CONVERGED, SATURATED, SATURATED_SHARE, Estimate, limited
from ib_analysis.estimators.samples import Samples, standardized

HIDDEN = 32
EMBEDDING = 8
BATCH = 256
LEARNING_RATE = 5e-3
WEIGHT_DECAY = 0.3
MOST_STEPS = 3000
STEPS_PER_CHECK = 50
PATIENCE = 8  # checks without a better bound
FEWEST_SAMPLES = 64
FEWEST_DOCUMENTS = 4

Contributions = Callable[[Tensor], Tensor]  # of scores [..., B, B], pairs on the diagonal: nats [..., B] whose mean is the bound
Pair = tuple[Tensor, Tensor]  # x [H, N, dx] and y [H, N, dy]


def lower_bound(samples: Samples, contributions: Contributions) -> Estimate:
    """The estimate from a bound; its interval is that of the bound with the critic that was found."""
    if samples.count < FEWEST_SAMPLES or samples.documents_count < FEWEST_DOCUMENTS:
        raise EstimatorError(
            f"{samples.count} samples of {samples.documents_count} documents are too few to train on some and measure others: "
            f"pass at least {FEWEST_SAMPLES} samples of {FEWEST_DOCUMENTS} documents"
        )
    x, y = (standardized(values).float().reshape(-1, *values.shape[-2:]) for values in (samples.x, samples.y))
    train, stop, last = (torch.as_tensor(rows, device=x.device) for rows in _split(samples.documents))
    critic = _Critic(len(x), samples.dim_x, samples.dim_y, x.device)
    converged = _train(critic, contributions, (x[:, train], y[:, train]), (x[:, stop], y[:, stop]))
    nats = critic.contributions(contributions, (x[:, last], y[:, last])).double()  # [H, M]
    bits = nats.reshape(*samples.x.shape[:-2], -1) / log(2)
    rows = last[: bits.shape[-1]].cpu().numpy()
    documents = np.unique(samples.documents[rows], return_inverse=True)[1]
    low, high = bootstrap_interval(bits.mean(-1), bits, documents)
    ceiling = log2(min(BATCH, len(last)))
    flags = {SATURATED: bits.mean(-1) > SATURATED_SHARE * ceiling, NOT_CONVERGED: ~converged.reshape(low.shape)}
    return limited(samples, bits.mean(-1), low, high, flags)


class _Critic:
    """One critic for each of H heads."""

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

    def scores(self, pair: Pair, batches: int) -> Tensor:
        """Scores [H, batches, B, B] of each x with each y of its batch."""
        f, g = (_embedded(network, values).unflatten(1, (batches, -1)) for network, values in zip((self.x, self.y), pair))
        product = f[..., :-1] @ g[..., :-1].mT / EMBEDDING**0.5
        return product + f[..., -1:] + g[..., -1:].mT

    @torch.no_grad()
    def contributions(self, contributions: Contributions, pair: Pair) -> Tensor:
        """Contributions [H, M] in batches; samples that do not fill the last batch are left out."""
        batches = max(1, pair[0].shape[1] // BATCH)
        x, y = (values[:, : batches * BATCH] for values in pair)
        return contributions(self.scores((x, y), batches)).flatten(1)


def _embedded(parameters: list[Tensor], values: Tensor) -> Tensor:
    """f [H, N, E] and a [H, N, 1], joined."""
    first, second, last, bypass, first_bias, second_bias, last_bias = parameters
    hidden = relu(torch.baddbmm(first_bias, values, first))
    hidden = relu(torch.baddbmm(second_bias, hidden, second))
    return torch.baddbmm(torch.baddbmm(last_bias, hidden, last), values, bypass)


def _train(critic: _Critic, contributions: Contributions, train: Pair, stop: Pair) -> Tensor:
    """Leaves the parameters that were best on the stopping samples; returns which heads had stopped improving [H]."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(critic.parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best = critic.contributions(contributions, stop).mean(-1)  # [H]
    kept = [parameter.detach().clone() for parameter in critic.parameters]
    waited = torch.zeros_like(best)
    count = train[0].shape[1]
    for step in range(1, MOST_STEPS + 1):
        rows = torch.randperm(count, generator=generator)[:BATCH].to(train[0].device)
        bound = contributions(critic.scores((train[0][:, rows], train[1][:, rows]), 1)).mean((1, 2))
        optimizer.zero_grad()
        (-bound.sum()).backward()
        optimizer.step()
        if step % STEPS_PER_CHECK == 0:
            now = critic.contributions(contributions, stop).mean(-1)
            better = now > best
            best, waited = torch.where(better, now, best), torch.where(better, 0, waited + 1)
            for parameter, old in zip(critic.parameters, kept):
                old[better] = parameter.detach()[better]
            if (waited >= PATIENCE).all():
                break
    for parameter, old in zip(critic.parameters, kept):
        parameter.data.copy_(old)
    return waited >= PATIENCE


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
