"""SnapKV (Li et al. 2024, arXiv 2404.14469): mean attention of the last queries, smoothed over neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ib_analysis.scorers.scorer import OBSERVED_QUERIES, observed_weights


@dataclass(frozen=True)
class SnapKV:
    """Mean attention weight of the last `window` queries, average-pooled over `kernel` tokens, an odd number."""

    window: int = OBSERVED_QUERIES
    kernel: int = 5

    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        """See `Scorer`."""
        mean = observed_weights(query, keys, valid, scaling, self.window).mean(2)  # [B, H_kv, T]
        return F.avg_pool1d(mean, self.kernel, stride=1, padding=self.kernel // 2)
