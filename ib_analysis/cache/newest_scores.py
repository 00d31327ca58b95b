"""How tokens are scored when they leave the windows, by the queries of the newest tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ib_analysis.cache.masks import only_in_front
from ib_analysis.scorers import Scorer


def newest_scores(
    scorer: Scorer, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, present: Tensor, scaling: float
) -> Tensor:
    """Scores [B, H_kv, T] of sinks and newest tokens, keys and values [B, H_kv, T, D], of which the last M have queries
    [B, H, M, D]; `present` bool [B, T] are no padding.

    Scorers know padding in front. Where there is other padding, a later message of another length say, each sequence is
    scored alone without it: its queries do not count. A sequence without new tokens keeps its newest.
    """
    if only_in_front(present):
        return scorer(module, query, keys, values, present, scaling)
    scores = torch.zeros(keys.shape[:3], device=keys.device)
    for b, valid in enumerate(present):
        place, new = valid.nonzero()[:, 0], valid[-query.shape[2] :].nonzero()[:, 0]
        if len(new) == 0:
            scores[b, :, place] = place.float()
            continue
        alone = query[b : b + 1, :, new], keys[b : b + 1, :, place], values[b : b + 1, :, place]
        scores[b, :, place] = scorer(module, *alone, torch.ones_like(place[None], dtype=torch.bool), scaling)[0]
    return scores
