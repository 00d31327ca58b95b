"""SnapKV (Li et al. 2024, arXiv 2404.14469): mean attention of the last queries, smoothed over neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ib_analysis.scorers.scorer import OBSERVED_QUERIES, attention_drawn


@dataclass(frozen=True)
class SnapKV:
    """Mean attention weight of the last `window` queries, average-pooled over `kernel` tokens, an odd number.

    The observed tokens themselves come before all others, and do not count in their neighbours' means.
    """

    window: int = OBSERVED_QUERIES
    kernel: int = 5

    @torch.no_grad()
    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        """See `Scorer`."""
        observed = query[:, :, -self.window :]
        older = keys.shape[2] - observed.shape[2]
        drawn = attention_drawn(observed, keys, valid, scaling)
        drawn[..., older:] = 0.0
        means = drawn / (observed.shape[2] * query.shape[1] // keys.shape[1])
        pooled = F.avg_pool1d(means, self.kernel, stride=1, padding=self.kernel // 2)
        pooled[..., older:] = 1.0  # which no mean weight exceeds
        return pooled
