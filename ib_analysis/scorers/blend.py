"""Two scorers' orders, averaged."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ib_analysis.errors import UnknownNameError
from ib_analysis.scorers.compactor import Compactor
from ib_analysis.scorers.repetition import RereadingScorer
from ib_analysis.scorers.scorer import Scorer
from ib_analysis.scorers.value_aware import ValueAware


@dataclass(frozen=True)
class Blend:
    """Mean of the places that two scorers give a token, `second_weight` that of the second: what both rank high comes first,
    on whatever scales they count."""

    first: Scorer = field(default_factory=ValueAware)
    second: Scorer = field(default_factory=Compactor)
    second_weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.second_weight <= 1:
            raise UnknownNameError(f"the second scorer's weight is a share from 0 to 1, not {self.second_weight!r}")
        if any(isinstance(scorer, RereadingScorer) for scorer in (self.first, self.second)):
            raise UnknownNameError("a blend reads the context once: it takes no scorer for which the model reads it again")

    @torch.no_grad()
    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        """See `Scorer`."""
        block = (module, query, keys, values, valid, scaling)
        first, second = _places(self.first(*block), valid), _places(self.second(*block), valid)
        return (1 - self.second_weight) * first + self.second_weight * second


def _places(scores: Tensor, valid: Tensor) -> Tensor:
    """Place in the order of scores [B, H_kv, T], the lowest 0 at the first token that is no padding: fp32."""
    order = scores.masked_fill(~valid[:, None], -torch.inf).argsort(dim=-1, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    places = torch.empty_like(order).scatter_(-1, order, place)
    return (places - (~valid).sum(1)[:, None, None]).float()
