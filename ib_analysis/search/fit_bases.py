"""Fits the bases of keys: channels sorted by what they matter to the queries.

An error e of a key changes a query's logit by q . e. With S the second moment of the queries and A that of the keys, each
weighted by what errors cost there, and S = L L^T, errors of L^T k cost their squares, and the eigenvectors of L^T A L make its
channels uncorrelated. To give these channels bits by their variance is the information bottleneck of Gaussian keys and logits
(Chechik et al. 2005, "Information bottleneck for Gaussian variables"). Channels of a quarter, which get the same bits, are mixed
by a Hadamard matrix, so that they are alike and nearly Gaussian.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ib_kernels.formats.rotated.reference import hadamard, hadamard_order
from torch import Tensor
from transformers import PreTrainedModel

from ib_analysis.cache.key_bases import KeyBases
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.errors import UnsupportedModelError
from ib_analysis.scorers.positions import frequencies, turned

RIDGE = 0.2  # of the mean variance of a channel, added to the queries' moment: prompts to come have other queries
TINY = 1e-30
FURTHEST = 64


def fit_bases(spec: CacheSpec, moments: Sequence[Tensor]) -> KeyBases:
    """The bases of all heads from their moments [2, D, D], summed over examples (see `TokenLosses`)."""
    of_heads = iter(moments)
    layers = [
        torch.stack([next(of_heads) for _ in range(layer.kv_heads)], 1) if layer.sliding_window is None else None
        for layer in spec.shape.layers
    ]  # [2, H, D, D] of each
    return KeyBases(tuple(None if both is None else _basis(both[0], both[1]) for both in layers))


def at_lengths(model: PreTrainedModel, moments: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Moments [2, D, D] of contexts of `tokens`, as they are on average over contexts of 1, 2, 4, ... times as many.

    Each counts half as much as the one before it; the longest is what the model was made for, but at most `FURTHEST` times
    `tokens`. Positions turn queries and keys: a context of n times `tokens` has its keys turned by 0, 1, ..., n - 1 times
    `tokens` positions, and its queries, at its end, by n - 1 times. Where it is not known how positions turn a model's
    channels, the moments are as they were.
    """
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", tokens)
    lengths = [n for k in range(FURTHEST.bit_length()) if (n := 2**k) <= max(1, longest // tokens)]
    of_queries, of_keys = torch.zeros(2, lengths[-1], dtype=torch.float64)
    for n in lengths:
        share = 1 / n / sum(1 / m for m in lengths)
        of_queries[n - 1] += share
        of_keys[:n] += share / n
    try:
        turns = {dim: _turns(model, dim, tokens, lengths[-1]) for dim in {both.shape[-1] for both in moments}}
    except UnsupportedModelError:
        return list(moments)
    weights = of_queries, of_keys
    return [torch.stack([_mean_turned(x, turns[x.shape[-1]], w) for x, w in zip(both, weights)]) for both in moments]


def _turns(model: PreTrainedModel, head_dim: int, tokens: int, count: int) -> Tensor:
    """float64 [count, D, D]: what x becomes is x @ turn, 0, 1, ... times `tokens` positions on."""
    eye = torch.eye(head_dim, dtype=torch.float64)
    radians = frequencies(model.get_decoder(), eye).cpu().double()
    return turned(eye[:, None], tokens * torch.arange(count), radians).transpose(0, 1)


def _mean_turned(moment: Tensor, turns: Tensor, weights: Tensor) -> Tensor:
    some = weights > 0
    return (weights[some, None, None] * (turns[some].mT @ moment @ turns[some])).sum(0)


def summed(total: Sequence[Tensor], more: Sequence[Tensor]) -> list[Tensor]:
    """Moments of more examples, head by head; `total` is empty before the first."""
    return [a + b for a, b in zip(total, more)] if total else list(more)


def _basis(queries: Tensor, keys: Tensor) -> Tensor:
    """fp16 [H, D, D] from second moments [H, D, D]."""
    head_dim = queries.shape[1]
    variance = queries.diagonal(dim1=1, dim2=2).mean(1).clamp(min=TINY)[:, None, None]
    metric = queries / variance + RIDGE * torch.eye(head_dim, dtype=torch.float64)
    root = torch.linalg.cholesky(metric)
    _, vectors = torch.linalg.eigh(root.mT @ keys @ root)  # the least variance first
    into = root @ vectors.flip(-1) @ _mixing(head_dim)
    # Contiguous, as when it is read from a file: the inverse depends on the order of the numbers in memory, in its last bits.
    return (into / into.square().mean((1, 2), keepdim=True).sqrt() / head_dim**0.5).half().contiguous()


def _mixing(head_dim: int) -> Tensor:
    """float64 [D, D]: orthonormal, within each quarter of the channels."""
    quarter = head_dim // 4
    matrix = hadamard(torch.eye(quarter)).double() / hadamard_order(quarter) ** 0.5
    return torch.block_diag(*[matrix] * 4)
