"""Scorers for which the model reads its context a second time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ib_analysis.scorers.scorer import Scorer, attention_blocks


@dataclass(frozen=True, eq=False)
class Repetition:
    """What one layer saw of n tokens of one sequence when the model read them again, behind the context."""

    module: nn.Module  # the attention layer
    query: Tensor  # [H, M, D], rotated
    keys: Tensor  # [H_kv, S + n + M, D]: the context's first tokens, the n tokens, and the queries' own
    values: Tensor  # [H_kv, n, D]
    scaling: float
    gradient: Tensor | None  # [M, hidden], of the last hidden states' squares at the layer's output; None if it is not needed

    def attention(self) -> Iterator[tuple[slice, Tensor]]:
        """Some queries at a time: (which, their weights fp32 [H_kv, G, m, n] of the tokens).

        As in kvpress, a query's weights are shared among these keys alone.
        """
        (heads, length, _), (kv_heads, tokens, _) = self.query.shape, self.values.shape
        begin, last = 0, self.keys.shape[1] - length
        valid = torch.ones(1, self.keys.shape[1], dtype=torch.bool, device=self.keys.device)
        for weights in attention_blocks(self.query[None], self.keys[None], valid, self.scaling):
            found = weights[0, :, :, last - tokens : last].reshape(kv_heads, heads // kv_heads, -1, tokens)
            yield slice(begin, begin + found.shape[2]), found
            begin += found.shape[2]


@runtime_checkable
class RereadingScorer(Scorer, Protocol):
    """A scorer that ranks the context by its repetition: `CompressedCache.fill` has the model read it again.

    Called as any scorer, it ranks the tokens that leave the windows during decoding, which nobody repeats.
    """

    @property
    def chunk(self) -> int:
        """Tokens that are read again at a time."""
        ...

    @property
    def differentiates(self) -> bool:
        """Whether it needs the gradient of the repetition."""
        ...

    def reread(self, seen: Repetition) -> Tensor:
        """Scores fp32 [H_kv, n] of the tokens that were read again."""
        ...
