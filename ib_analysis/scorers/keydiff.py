"""KeyDiff (Park et al. 2025, arXiv 2504.15364): keys unlike the others are those that attention tells apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def keydiff(module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
    """Minus the cosine of the key and the mean direction of all keys (see `Scorer`)."""
    directions = F.normalize(keys.float(), dim=-1)  # [B, H_kv, T, D]
    mean = (directions * valid[:, None, :, None]).sum(2, keepdim=True)  # of any length
    return -F.cosine_similarity(directions, mean, dim=-1)
