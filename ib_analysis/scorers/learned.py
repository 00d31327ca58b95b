"""A scorer that is fitted to a model: which cheap signs tell, head by head, what evicting a token would cost."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn

from ib_analysis.errors import CalibrationError
from ib_analysis.scorers.compactor import leverage, noncausal_attention
from ib_analysis.scorers.keydiff import keydiff
from ib_analysis.scorers.positions import without_positions
from ib_analysis.scorers.scorer import sequences
from ib_analysis.scorers.snapkv import SnapKV
from ib_analysis.scorers.value_aware import ValueAware

CHUNK = 256  # tokens that see one another in the non-causal attention
FLOOR = 1e-9  # of the mean, below which a sign says nothing more
SIGNS = (
    "value_aware",
    "value_aware, 8 queries",
    "attention",
    "non-causal attention",
    "key leverage",
    "key leverage, without positions",
    "value leverage",
    "value norm",
    "key norm",
    "key difference",
    "distance to the end",
    "position",
)


@dataclass(frozen=True)
class Learned:
    """A weighted sum of `token_signs`, with weights [layers][H_kv][signs].

    Calibration fits them (`ib_analysis.search.fit_scorer`): the sum predicts the information that is lost with the token alone,
    from what is known when the cache is compressed. Without weights it ranks as value_aware does.
    """

    weights: tuple[tuple[tuple[float, ...], ...], ...] = ()

    def __post_init__(self) -> None:
        rows = tuple(tuple(tuple(map(float, head)) for head in layer) for layer in self.weights)  # JSON has lists
        if any(len(head) != len(SIGNS) or not all(map(isfinite, head)) for layer in rows for head in layer):
            raise CalibrationError(
                f"a learned scorer needs {len(SIGNS)} finite weights a head, of {', '.join(SIGNS)}: fit it again"
            )
        object.__setattr__(self, "weights", rows)

    def __repr__(self) -> str:
        return f"Learned(fitted to {sum(map(len, self.weights))} heads)" if self.weights else "Learned()"

    @torch.no_grad()
    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        """See `Scorer`. Raises CalibrationError if it has weights, but none for this layer and its heads."""
        if not self.weights:
            return ValueAware()(module, query, keys, values, valid, scaling)
        layer = module.layer_idx
        heads = self.weights[layer] if isinstance(layer, int) and layer < len(self.weights) else ()
        if len(heads) != keys.shape[1]:
            raise CalibrationError(
                f"this learned scorer has weights for {len(heads)} KV heads of layer {layer}, which has {keys.shape[1]}: "
                "optimal_allocation fits one to a model"
            )
        weights = torch.tensor(heads, device=keys.device)  # [H_kv, signs]
        return torch.einsum("bhts,hs->bht", token_signs(module, query, keys, values, valid, scaling), weights)


@torch.no_grad()
def token_signs(module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
    """What tells which tokens matter, mostly logarithms: fp32 [B, H_kv, T, signs], 0 on average over a sequence's tokens.

    Arguments are those of a scorer. Each sequence is read alone, so that the others and padding do not count.
    """
    signs = torch.zeros(*keys.shape[:3], len(SIGNS), dtype=torch.float32, device=keys.device)
    for b, first, q, k, v in sequences(query, keys, values, valid):
        found = _signs(module, q[None], k[None], v[None], scaling)
        signs[b, :, first:] = found - found.mean(1, keepdim=True)
    return signs


def _signs(module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Of one sequence: [H_kv, T, signs]."""
    tokens = keys.shape[2]
    block = (module, query, keys, values, torch.ones(1, tokens, dtype=torch.bool, device=keys.device), scaling)
    norm = values[0].norm(dim=-1)
    positive = [
        ValueAware()(*block)[0],
        ValueAware(window=8)(*block)[0],
        SnapKV()(*block)[0],
        noncausal_attention(query[0], keys[0], CHUNK) * norm,
        leverage(keys[0]),
        leverage(without_positions(module, keys[0])),
        leverage(values[0]),
        norm,
        keys[0].norm(dim=-1),
    ]
    position = torch.arange(tokens, device=keys.device, dtype=torch.float32).expand_as(norm)
    others = [keydiff(*block)[0], (tokens - position).log(), position / tokens]
    logs = [(x + FLOOR * x.mean() + torch.finfo(torch.float32).tiny).log() for x in positive]
    return torch.stack([*logs, *others], -1)
