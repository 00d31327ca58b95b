"""CriticalKV (Feng et al. 2025, arXiv 2502.03805): another scorer's weight times what the token's value adds to the layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ib_analysis.errors import UnsupportedModelError
from ib_analysis.scorers.scorer import CHUNK_BYTES
from ib_analysis.scorers.snapkv import SnapKV

FLOOR = 1e-4  # added to weights, so that among tokens without attention the values decide


@dataclass(frozen=True)
class CriticalKV:
    """(SnapKV's score + 1e-4) times the L1 norm of the value after the layer's output projection, a mean over query heads.

    The paper first takes half of the kept tokens by their weights alone. How many are kept is not known when tokens are
    ranked, so that stage is left out.
    """

    weights: SnapKV = field(default_factory=SnapKV)

    @torch.no_grad()
    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        """See `Scorer`. Raises UnsupportedModelError for a layer without `o_proj`."""
        weights = self.weights(module, query, keys, values, valid, scaling)
        return (weights + FLOOR) * projected_norms(module, values, 1).mean(2)


def projected_norms(module: nn.Module, values: Tensor, order: int) -> Tensor:
    """Norms of values [B, H_kv, T, D] after the output projection of each query head: fp32 [B, H_kv, G, T].

    `order` 1 sums magnitudes, 2 is Euclid's. Raises UnsupportedModelError for a layer without `o_proj`.
    """
    projection = getattr(module, "o_proj", None)
    if projection is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no o_proj to multiply values by: use another scorer")
    batch, heads, tokens, head_dim = values.shape
    columns = projection.weight.float().T.reshape(heads, -1, head_dim, projection.weight.shape[0])  # [H_kv, G, D, hidden]
    norms = torch.empty(batch, heads, columns.shape[1], tokens, dtype=torch.float32, device=values.device)
    size = max(1, CHUNK_BYTES // (4 * batch * heads * columns.shape[3]))
    for begin in range(0, tokens, size):
        some = values[:, :, begin : begin + size].float()
        of_heads = [(some @ columns[:, g]).norm(order, dim=-1) for g in range(columns.shape[1])]  # G of [B, H_kv, m]
        norms[..., begin : begin + size] = torch.stack(of_heads, 2)
    return norms
