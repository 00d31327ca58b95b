"""KVgrad (openreview.net/forum?id=cg1wTCJjjk): what tokens do to the last hidden states when the model repeats its context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ib_analysis.scorers.criticalkv import projected_norms
from ib_analysis.scorers.repetition import Repetition
from ib_analysis.scorers.value_aware import ValueAware


@dataclass(frozen=True)
class KVgrad:
    """Input times gradient: the largest product, over the queries of the repetition and the query heads of a group, of a token's
    attention weight, the norm of its value after the output projection, and the norm of the gradient of the layer's output.

    The gradient is that of the sum of squares of the last hidden states, before they are normalised. The context is repeated,
    `chunk` tokens at a time, as by `KVzip`, and `ValueAware` ranks the tokens that leave the windows during decoding.
    """

    chunk: int = 512
    differentiates: ClassVar[bool] = True

    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        """See `Scorer`."""
        return ValueAware()(module, query, keys, values, valid, scaling)

    @torch.no_grad()
    def reread(self, seen: Repetition) -> Tensor:
        """See `RereadingScorer`. Raises UnsupportedModelError for a layer without `o_proj`."""
        assert seen.gradient is not None
        slope = seen.gradient.float().norm(dim=-1)[:, None]  # [M, 1]
        most = torch.zeros((), device=seen.values.device)
        for queries, weights in seen.attention():
            most = torch.maximum(most, (weights * slope[queries]).amax(2))  # [H_kv, G, n]
        return (most * projected_norms(seen.module, seen.values[None], 2)[0]).amax(1)
