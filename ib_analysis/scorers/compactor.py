"""Compactor (Chari and Van Durme 2025, arXiv 2507.08143): keys unlike others, and tokens that their neighbours look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ib_analysis.scorers.positions import without_positions
from ib_analysis.scorers.scorer import sequences

JITTER = 1e-2  # added to the eigenvalues of the keys' second moment
SINKS, RECENT = 8, 4  # tokens of a whole sequence that come first in any case, and do not count in statistics


@dataclass(frozen=True)
class Compactor:
    """`leverage_weight` times the leverage score of the key, plus non-causal attention within chunks of `chunk` tokens times the
    norm of the value, both in standard deviations over the tokens and heads of a layer. Sees every query of the block.

    Leverage is that of keys before they are rotated by position (where it is not known how, of keys as they are cached), and
    exact, where the paper takes a random sketch. Its weight there is the share of tokens that is evicted, which is not known
    when tokens are ranked. As in kvpress the logits of the attention lack their factor, and the first 8 and last 4 tokens of a
    sequence come first.
    """

    leverage_weight: float = 0.9
    chunk: int = 256

    @torch.no_grad()
    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        """See `Scorer`."""
        scores = torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
        for b, first, q, k, v in sequences(query, keys, values, valid):  # chunks and statistics begin where a sequence does
            scores[b, :, first:] = self._of_sequence(module, q, k, v)
        return scores

    def _of_sequence(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Scores [H_kv, T] of queries [H, M, D], keys and values [H_kv, T, D]."""
        tokens = keys.shape[1]
        whole = query.shape[1] == tokens > SINKS + RECENT
        some = slice(SINKS, tokens - RECENT) if whole else slice(None)
        attention = noncausal_attention(query[:, some] if whole else query, keys[:, some], self.chunk)
        attention = F.avg_pool1d(attention * values[:, some].norm(dim=-1), 3, stride=1, padding=1)
        levered = leverage(without_positions(module, keys[:, some]))
        scores = self.leverage_weight * _standardised(levered) + _standardised(attention)
        return F.pad(scores, (SINKS, RECENT), value=float(scores.max())) if whole else scores


def leverage(x: Tensor) -> Tensor:
    """How far each token's x [..., T, D] lies from the mean, in the metric of all tokens' spread: [..., T]."""
    x = x - x.mean(-2, keepdim=True)
    moment = x.mT @ x + JITTER * torch.eye(x.shape[-1], device=x.device)  # [..., D, D]
    return (x * torch.linalg.solve(moment, x.mT).mT).sum(-1).clamp(min=0)


def noncausal_attention(query: Tensor, keys: Tensor, chunk: int) -> Tensor:
    """What tokens draw from the queries of their chunk, those before and after them: [H_kv, T], a mean over query heads.

    Queries [H, M, D] are those of the last M of T tokens, keys [H_kv, T, D]; a chunk without queries gets 0. Logits are the
    products themselves.
    """
    (kv_heads, tokens, head_dim), older = keys.shape, keys.shape[1] - query.shape[1]
    drawn = torch.zeros(kv_heads, tokens, device=keys.device)
    for begin in range(older // chunk * chunk, tokens, chunk):
        end = begin + chunk
        rows = query[:, max(0, begin - older) : end - older].reshape(kv_heads, -1, head_dim)  # [H_kv, G * m, D]
        drawn[:, begin:end] = (rows @ keys[:, begin:end].mT).softmax(-1).sum(1)
    return drawn * (kv_heads / query.shape[0])


def _standardised(scores: Tensor) -> Tensor:
    """Scores [H_kv, T] less their mean, in standard deviations."""
    return (scores - scores.mean()) / scores.std().clamp(min=1e-6)
