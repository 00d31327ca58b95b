"""H2O (Zhang et al. 2023, arXiv 2306.14048): the attention that a token has drawn from all queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ib_analysis.scorers.scorer import attention_drawn


@torch.no_grad()
def h2o(module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
    """Mean attention weight of the queries that see the token (see `Scorer`).

    The mean over queries, not their sum, which would favour tokens that more queries come after. When tokens leave the window,
    the queries are those of the newest block.
    """
    drawn = attention_drawn(query, keys, valid, scaling)
    tokens, queries, groups = keys.shape[2], query.shape[2], query.shape[1] // keys.shape[1]
    after = torch.arange(tokens, 0, -1, device=keys.device).clamp(max=queries)
    return drawn / (after * groups)
