"""TOVA (Oren et al. 2024, arXiv 2401.06104): the attention of the last query, the same for all heads of a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ib_analysis.scorers.scorer import attention_drawn


@torch.no_grad()
def tova(module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
    """Mean over heads of the last query's attention weight (see `Scorer`)."""
    drawn = attention_drawn(query[:, :, -1:], keys, valid, scaling)  # [B, H_kv, T]
    return (drawn.sum(1, keepdim=True) / query.shape[1]).expand_as(drawn)
