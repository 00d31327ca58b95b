"""What evicting each token alone would cost, by the gradient: what a learned scorer is to predict."""

from __future__ import annotations

import torch
from torch import Tensor

from ib_analysis.replay.replay import Replay
from ib_analysis.search.gradient import attending, heads_alike, score_gradients
from ib_analysis.search.output_changes import Attending


def token_losses(replay: Replay, generator: torch.Generator) -> Tensor:
    """Of each compressible token: fp32 [U, n], up to a common factor, heads in the order of `shape.heads`.

    Without token i a head's output o moves by p_i (o - v_i), to first order in its weight p_i. The loss is the mean square of
    that along the gradients of sampled log-probabilities, summed over predictions (see `gradient`).
    """
    answered, gradients = score_gradients(replay, generator)
    with torch.no_grad():
        chunks = [_token_losses(attending(replay, heads, answered, gradients)) for heads in heads_alike(replay, answered)]
    return torch.cat([chunk.cpu() for chunk in chunks])


def _token_losses(heads: Attending) -> Tensor:
    logits = heads.logits(heads.keys)  # [U, R, n]
    lse = torch.logaddexp(heads.exact[1], logits.logsumexp(-1))
    weights = (logits - lse[..., None]).exp()
    level = torch.einsum("urd,usrd->usr", heads.full, heads.directions)
    losses = torch.zeros_like(heads.keys[..., 0])
    for s in range(heads.directions.shape[1]):
        drawn = weights.mT @ heads.directions[:, s]  # [U, n, D]
        moved = (drawn * heads.values).sum(-1) - torch.einsum("urn,ur->un", weights, level[:, s])
        losses += moved.square()
    return losses
