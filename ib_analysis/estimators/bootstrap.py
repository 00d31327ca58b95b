"""Intervals by resampling whole documents."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RESAMPLES = 1000
MOST_GROUPS = 500  # more documents than that are merged at random: as good, and cheaper
LEVEL = 0.95


def bootstrap_interval(bits: Tensor, influence: Tensor, documents: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """95% interval (low, high) [...] of an estimate [...] whose samples move it by influence [..., N] / N each.

    A cluster bootstrap (Field & Welsh 2007) of the linearised estimate: what a sample adds is computed once, documents are
    then drawn with replacement.
    """
    groups, drawn = _resamples(int(documents.max()) + 1)
    group = torch.as_tensor(groups[documents], device=influence.device)  # [N]
    count = drawn.shape[1]
    centred = influence - influence.mean(-1, keepdim=True)
    sums = torch.zeros((*bits.shape, count), dtype=influence.dtype, device=influence.device)
    sums.index_add_(-1, group, centred)  # [..., G]
    draws = torch.as_tensor(drawn, dtype=sums.dtype, device=sums.device)
    moved = sums @ draws.T / influence.shape[-1]  # [..., R]
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=moved.dtype, device=moved.device)
    low, high = moved.quantile(tails, dim=-1)
    return bits + low, bits + high


@lru_cache(maxsize=4)
def _resamples(documents: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The group of each document, and how often each of RESAMPLES draws takes each group: [documents] and [R, G].

    Kept between calls, because drawing takes longer than most estimates.
    """
    rng = np.random.default_rng(0)
    groups = rng.permutation(documents) % MOST_GROUPS
    count = min(documents, MOST_GROUPS)
    return groups, rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
