"""Entropy of variables that take few values, column by column."""

from __future__ import annotations

from math import log, log2

import torch
from torch import Tensor

from ib_analysis.estimators.chunks import in_chunks
from ib_analysis.estimators.order import as_given, ordered, runs

PROBE = 64  # samples among which a column of few values is expected to repeat itself
SAMPLES_PER_VALUE = 8  # a column counts as discrete if its values occur so often on average


def occurrences(values: Tensor) -> Tensor:
    """How often each value of values [..., N, d] occurs in its column: int64 [..., N, d]."""
    order, less, not_greater = runs(values)
    return as_given(order, not_greater - less)


def distinct_values(occurrence: Tensor) -> Tensor:
    """How many values each column takes [..., d], from its occurrences [..., N, d]."""
    return occurrence.double().reciprocal().sum(-2).round()


def entropies_of_occurrences_bits(values: Tensor, occurrence: Tensor) -> Tensor:
    """Entropy in bits of each column [..., d] of values [..., N, d], from their `occurrences`.

    Plug-in entropy plus the correction (K - 1) / 2N nats of Miller (1955) and Madow (1954), but no more than the log of the
    range of the values, if these are integers.
    """
    count = values.shape[-2]
    entropy = log2(count) - occurrence.double().log2().mean(-2)
    entropy = entropy + (distinct_values(occurrence) - 1) / (2 * count * log(2))
    integers = (values == values.round()).all(-2)
    levels = values.amax(-2).double() - values.amin(-2).double() + 1
    return entropy.minimum(levels.log2().where(integers, torch.inf)).clamp(min=0)  # rounding


def entropies_of_counts_bits(counts: Tensor) -> Tensor:
    """As `entropies_of_occurrences_bits`, from how often each of L integer codes occurs: float64 [...] of counts [..., L]."""
    samples = counts.sum(-1, keepdim=True).clamp(min=1).double()
    share = counts / samples
    entropy = -torch.xlogy(share, share).sum(-1) / log(2)
    used = counts > 0
    entropy = entropy + (used.sum(-1) - 1) / (2 * samples[..., 0] * log(2))
    levels = torch.arange(1, counts.shape[-1] + 1, device=counts.device)
    highest = (used * levels).amax(-1)
    lowest = torch.where(used, levels, counts.shape[-1]).amin(-1)
    return entropy.minimum((highest - lowest + 1).clamp(min=1).double().log2()).clamp(min=0)


def entropy_limit_bits(values: Tensor) -> Tensor:
    """Upper bound in bits [...] on the entropy of values [..., N, d]: the sum over columns; infinite where one is continuous."""
    limit = torch.full(values.shape[:-2], torch.inf, dtype=torch.float64, device=values.device)
    probe = ordered(values[..., :PROBE, :].mT)  # [..., d, PROBE]
    suspects = (probe[..., 1:] == probe[..., :-1]).any(-1).all(-1)  # [...]; continuous values never repeat
    if suspects.any():
        (limit[suspects],) = in_chunks(_limits_of_suspects, values[suspects])
    return limit


def lesser_entropy_limit_bits(x: Tensor, y: Tensor) -> Tensor:
    """Upper bound in bits [...] on the entropy of x [..., N, dx] or of y [..., N, dy]: on what they share."""
    return torch.minimum(entropy_limit_bits(x), entropy_limit_bits(y).to(x.device))


def _limits_of_suspects(values: Tensor) -> tuple[Tensor]:
    occurrence = occurrences(values)
    discrete = (distinct_values(occurrence) * SAMPLES_PER_VALUE <= values.shape[-2]).all(-1)
    return (entropies_of_occurrences_bits(values, occurrence).sum(-1).where(discrete, torch.inf),)
