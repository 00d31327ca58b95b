"""Which ranked tokens a tier takes: the one place that says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Count = TypeVar("Count", int, NDArray[np.int64])


def tier_counts(token_shares: Sequence[float], tokens: Count) -> list[Count]:
    """How many of `tokens` compressible tokens each tier takes.

    A tier takes its share of what the tiers before it left. So when tokens are added, no count falls, and all counts
    together grow by no more than what was added: a longer cache never needs a token back that it has evicted.
    """
    counts: list[Count] = []
    left, left_share = tokens, 1.0
    for token_share in token_shares:
        share = min(1.0, token_share / left_share) if left_share > 0 else 0.0
        count = np.floor(share * np.asarray(left) + 1e-9).astype(np.int64)
        counts.append(int(count) if isinstance(tokens, int) else count)
        left = left - counts[-1]
        left_share -= token_share
    return counts


def tier_edges(token_shares: Sequence[float], tokens: Count, before: Count | None = None) -> list[Count]:
    """Rank of the first token that each tier takes, and of the first that none takes: one more than there are tiers.

    With `before`, of the tokens that come in when `before` compressible tokens become `tokens`.
    """
    counts = tier_counts(token_shares, tokens)
    if before is not None:
        counts = [count - old for count, old in zip(counts, tier_counts(token_shares, before))]
    edges = [tokens * 0]
    for count in counts:
        edges.append(edges[-1] + count)
    return edges


def ranks(scores: Tensor, ranked: Tensor) -> Tensor:
    """Place of each token in the order of scores [..., T], the highest first, from 0: int64 [..., T].

    Tokens outside of the mask `ranked`, bool and of a shape that broadcasts to the scores', come after all others.
    """
    scores = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~ranked, -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


def taken(ranks: Tensor, begin: int, end: int) -> Tensor:
    """Positions of the tokens ranked from `begin` to before `end`, in order: int64 [..., end - begin] of ranks [..., T]."""
    return ((ranks >= begin) & (ranks < end)).nonzero()[:, -1].reshape(*ranks.shape[:-1], end - begin)


def tier_rows(rank: Tensor, heads: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Rows (b * H_kv + h) * T + t of tokens with begin <= rank < end, run after run: int64 [N].

    rank is [B, H_kv, T], begin and end are [B, tiers] for the tiers of `heads` [tiers].
    """
    of_tier = rank[:, heads]  # [B, tiers, T]
    inside = (of_tier >= begin[..., None]) & (of_tier < end[..., None])
    sequence, tier, token = inside.nonzero().unbind(1)
    return (sequence * rank.shape[1] + heads[tier]) * rank.shape[2] + token
