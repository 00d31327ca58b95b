"""Tokens in no particular order: the line that a scorer must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomOrder:
    """Uniform random numbers, a draw for each layer and KV head. The same at the same distance from the end, so that padding
    on the left changes nothing."""

    seed: int = 0

    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        """See `Scorer`."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + (getattr(module, "layer_idx", None) or 0))
        drawn = torch.rand(keys.shape[2], keys.shape[1], dtype=torch.float64, generator=generator)  # [T, H_kv]
        return drawn.flip(0).T.float().to(keys.device).expand(keys.shape[:3])
