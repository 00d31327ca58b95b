"""What a scorer is, and the attention weights that most of them read."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

OBSERVED_QUERIES = 32  # the last queries, which stand for those to come


class Scorer(Protocol):
    """A function, or a frozen dataclass whose fields are its parameters."""

    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        """Scores fp32 [B, H_kv, T] of the tokens; the tokens with the highest scores are kept.

        module is the attention layer; query [B, H, M, D] are rotated queries of the last M positions; keys and values
        [B, H_kv, T, D]; valid bool [B, T] is false at padding; scaling is the factor of the logits.
        """
        ...


def observed_weights(query: Tensor, keys: Tensor, valid: Tensor, scaling: float, window: int) -> Tensor:
    """Causal attention weights fp32 [B, H_kv, G * W, T] of the last W queries, G query heads for each KV head."""
    query = query[:, :, -window:].float()
    batch, heads, observed, _ = query.shape
    kv_heads, tokens = keys.shape[1:3]
    grouped = query.reshape(batch, kv_heads, -1, query.shape[-1])  # [B, H_kv, G * W, D]
    logits = grouped @ keys.float().transpose(2, 3) * scaling
    position = torch.arange(tokens, device=keys.device)
    causal = position <= position[tokens - observed :, None]  # [W, T]
    visible = (causal & valid[:, None, :]).repeat(1, heads // kv_heads, 1)[:, None]  # [B, 1, G * W, T]
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return weights.nan_to_num(0.0)  # a padded query sees nothing
