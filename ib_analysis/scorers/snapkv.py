"""SnapKV (Li et al. 2024, arXiv 2404.14469): mean attention of the last queries, smoothed over neighbours."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ib_analysis.scorers.scorer import observed_weights

KERNEL = 5


def snapkv(query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
    """Mean attention weight, average-pooled over five tokens (see `Scorer`)."""
    mean = observed_weights(query, keys, valid, scaling).mean(2)  # [B, H_kv, T]
    return F.avg_pool1d(mean, KERNEL, stride=1, padding=KERNEL // 2)
