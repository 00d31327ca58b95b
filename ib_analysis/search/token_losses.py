"""What each token of each head matters, by the gradient: what a learned scorer is to predict, and bases of keys are made for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ib_analysis.replay.replay import Replay
from ib_analysis.search.gradient import attending, heads_alike, score_gradients
from ib_analysis.search.output_changes import Attending

TINY = 1e-30  # of a variance, so that what never differs is not divided by 0


class TokenLosses(NamedTuple):
    """Of U heads, in the order of `shape.heads`.

    Attributes:
        evicted: fp32 [U, n], what evicting each compressible token alone would cost, up to a common factor. Without token i a
            head's output o moves by p_i (o - v_i), to first order in its weight p_i. The loss is the mean square of that along
            the gradients of sampled log-probabilities, summed over predictions (see `gradient`).
        moments: float64 [2, D, D] of each head, second moments of queries, and of keys around their mean. Each is the sum of two
            of mean variance 1: of all alike, because what matters differs from example to example, and weighted by what small
            errors of their logits cost, the mean square of p_i (v_i - o) along the gradients.
    """

    evicted: Tensor
    moments: list[Tensor]


def token_losses(replay: Replay, generator: torch.Generator) -> TokenLosses:
    """Those of the compressible tokens of one example."""
    answered, gradients = score_gradients(replay, generator)
    with torch.no_grad():
        chunks = [_token_losses(attending(replay, heads, answered, gradients)) for heads in heads_alike(replay, answered)]
    return TokenLosses(torch.cat([chunk.evicted for chunk in chunks]), [moments for chunk in chunks for moments in chunk.moments])


def _token_losses(heads: Attending) -> TokenLosses:
    logits = heads.logits(heads.keys)  # [U, R, n]
    lse = torch.logaddexp(heads.exact[1], logits.logsumexp(-1))
    weights = (logits - lse[..., None]).exp()
    level = torch.einsum("urd,usrd->usr", heads.full, heads.directions)
    evicted = torch.zeros_like(heads.keys[..., 0])
    matters = torch.zeros_like(weights)
    for s in range(heads.directions.shape[1]):
        moved = weights * (heads.directions[:, s] @ heads.values.mT - level[:, s, :, None])
        evicted += moved.sum(1).square()
        matters += moved.square()
    queries, keys = heads.query.double(), heads.keys.double()
    centred = keys - keys.mean(1, keepdim=True)
    of_queries, of_keys = (matters.sum(axis, dtype=torch.float64) for axis in (2, 1))
    moments = torch.stack([_moments(queries, of_queries), _moments(centred, of_keys)], 1)  # [U, 2, D, D]
    return TokenLosses(evicted.cpu(), list(moments.cpu()))


def _moments(x: Tensor, weights: Tensor) -> Tensor:
    """float64 [U, D, D] of rows x [U, N, D]: see `TokenLosses`."""
    both = torch.stack([x.mT @ x, (x * weights[..., None]).mT @ x])
    variance = both.diagonal(dim1=2, dim2=3).mean(2).clamp(min=TINY)
    return (both / variance[..., None, None]).sum(0)
