"""Intervals by resampling whole documents."""

from __future__ import annotations

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
    rng = np.random.default_rng(0)
    groups = rng.permutation(int(documents.max()) + 1) % MOST_GROUPS  # [documents]
    group = torch.as_tensor(groups[documents], device=influence.device)  # [N]
    count = int(groups.max()) + 1
    centred = influence - influence.mean(-1, keepdim=True)
    sums = torch.zeros((*bits.shape, count), dtype=influence.dtype, device=influence.device)
    sums.index_add_(-1, group, centred)  # [..., G]
    draws = torch.as_tensor(rng.multinomial(count, np.full(count, 1 / count), RESAMPLES), device=sums.device)  # [R, G]
    moved = sums @ draws.to(sums.dtype).T / influence.shape[-1]  # [..., R]
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=moved.dtype, device=moved.device)
    low, high = moved.quantile(tails, dim=-1)
    return bits + low, bits + high
