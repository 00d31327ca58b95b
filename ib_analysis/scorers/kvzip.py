"""KVzip (Kim et al. 2025, arXiv 2505.23416): the attention that a token draws when the model repeats its context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ib_analysis.scorers.repetition import Repetition
from ib_analysis.scorers.value_aware import ValueAware


@dataclass(frozen=True)
class KVzip:
    """The largest weight that any query of the repetition gives a token. The context is repeated `chunk` tokens at a time.

    The paper's model is asked to repeat; here it reads the chunk behind the context, which ranks as well and needs no words of
    any language. Nothing is repeated when tokens leave the windows during decoding: `ValueAware` ranks them.
    """

    chunk: int = 2048
    differentiates: ClassVar[bool] = False

    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        """See `Scorer`."""
        return ValueAware()(module, query, keys, values, valid, scaling)

    @torch.no_grad()
    def reread(self, seen: Repetition) -> Tensor:
        """See `RereadingScorer`."""
        most = torch.zeros(seen.values.shape[:2], device=seen.values.device)
        for _, weights in seen.attention():
            most = torch.maximum(most, weights.amax((1, 2)))
        return most
