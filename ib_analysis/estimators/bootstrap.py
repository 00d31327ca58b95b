"""Intervals by resampling whole documents."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ib_analysis.estimators.order import ordered

RESAMPLES = 1000
MAX_GROUPS = 500  # more documents than that are merged at random: as good, and cheaper
LEVEL = 0.95


def bootstrap_interval(bits: Tensor, influence: Tensor, documents: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """95% interval (low, high) [...] of an estimate [...] whose samples move it by influence [..., N] / N each.

    A cluster bootstrap (Field & Welsh 2007) of the linearised estimate: what a sample adds is computed once, documents are
    then drawn with replacement.
    """
    groups, draws = _resamples(int(documents.max()) + 1)
    group = torch.as_tensor(groups[documents], device=influence.device)  # [N]
    count = draws.shape[1]
    centred = influence - influence.mean(-1, keepdim=True)
    sums = torch.zeros((*bits.shape, count), dtype=influence.dtype, device=influence.device)
    sums.index_add_(-1, group, centred)  # [..., G]
    moved = ordered(sums @ draws.to(sums).T / influence.shape[-1])  # [..., R]
    return bits + _quantile(moved, (1 - LEVEL) / 2), bits + _quantile(moved, (1 + LEVEL) / 2)


def _quantile(ascending: Tensor, share: float) -> Tensor:
    """Value [...] below which a share of values [..., R] lies, between the two nearest."""
    place = share * (ascending.shape[-1] - 1)
    return torch.lerp(ascending[..., int(place)], ascending[..., int(place) + 1], place % 1)


@lru_cache(maxsize=4)
def _resamples(documents: int) -> tuple[NDArray[np.int64], Tensor]:
    """The group of each document, and how often each of RESAMPLES draws takes each group: [documents] and [R, G].

    Kept between calls, because drawing takes longer than most estimates.
    """
    rng = np.random.default_rng(0)
    groups = rng.permutation(documents) % MAX_GROUPS
    count = min(documents, MAX_GROUPS)
    drawn = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return groups, torch.as_tensor(drawn, dtype=torch.float64)
