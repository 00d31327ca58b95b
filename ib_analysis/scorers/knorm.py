"""Knorm (Devoto et al. 2024, arXiv 2406.11430): keys of small norm attract attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def knorm(module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
    """Minus the norm of the key (see `Scorer`)."""
    return -keys.float().norm(dim=-1)
