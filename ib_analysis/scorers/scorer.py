"""What a scorer is, and the attention weights that most of them read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

OBSERVED_QUERIES = 32  # the last queries, which stand for those to come
CHUNK_BYTES = 2**26  # of the largest tensor that a scorer holds, whatever the number of tokens


class Scorer(Protocol):
    """A function, or a frozen dataclass whose fields are its parameters."""

    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        """Scores fp32 [B, H_kv, T] of the tokens; the tokens with the highest scores are kept.

        module is the attention layer; query [B, H, M, D] are rotated queries of the last M positions; keys and values
        [B, H_kv, T, D]; valid bool [B, T] is false at padding, which is in front; scaling is the factor of the logits.
        """
        ...


def sequences(query: Tensor, keys: Tensor, values: Tensor, valid: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """Each sequence without its padding: (b, position of its first token, queries fp32 [H, m, D], keys, values [H_kv, t, D])."""
    for b, first in enumerate((~valid).sum(1).tolist()):
        queries = min(query.shape[2], keys.shape[2] - first)
        newest = query[b, :, query.shape[2] - queries :]
        yield b, first, newest.float(), keys[b, :, first:].float(), values[b, :, first:].float()


def attention_blocks(query: Tensor, keys: Tensor, valid: Tensor, scaling: float) -> Iterator[Tensor]:
    """Causal attention weights of all queries [B, H, M, D], some queries at a time: fp32 [B, H_kv, G * m, T].

    G query heads share a KV head. Memory does not grow with M; the weights of a padded query are 0.
    """
    (batch, kv_heads, tokens, _), length = keys.shape, query.shape[2]
    position = torch.arange(tokens, device=keys.device)
    size = max(1, CHUNK_BYTES // (4 * batch * query.shape[1] * tokens))
    for begin in range(0, length, size):
        some = query[:, :, begin : begin + size].float()
        rows = some.reshape(batch, kv_heads, -1, some.shape[-1])  # [B, H_kv, G * m, D]
        logits = rows @ keys.float().transpose(2, 3) * scaling
        of_queries = position[tokens - length + begin :][: some.shape[2], None]  # [m, 1]
        visible = (position <= of_queries) & valid[:, None]  # [B, m, T]
        visible = visible.repeat(1, query.shape[1] // kv_heads, 1)[:, None]
        yield logits.masked_fill_(~visible, -torch.inf).softmax(-1).nan_to_num_(0.0)


def attention_drawn(query: Tensor, keys: Tensor, valid: Tensor, scaling: float) -> Tensor:
    """Sum over these queries and the heads of a group of their attention weights: fp32 [B, H_kv, T]."""
    drawn = torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
    for weights in attention_blocks(query, keys, valid, scaling):
        drawn += weights.sum(2)
    return drawn
