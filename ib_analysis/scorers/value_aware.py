"""Value-aware attention: how far a token moves the head's output, root mean square over the observed queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ib_analysis.scorers.scorer import CHUNK_BYTES, OBSERVED_QUERIES


@dataclass(frozen=True)
class ValueAware:
    """Mean over the last `window` queries of p_i^2 |v_i - o|^2, the square of the output's change to first order in p_i."""

    window: int = OBSERVED_QUERIES

    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        """See `Scorer`."""
        return value_aware_scores(query[:, :, -self.window :], keys, values, valid, scaling)


@torch.no_grad()
def value_aware_scores(query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
    """How far a token moves the output of its head: mean over queries of p_i^2 |v_i - o|^2, with attention weights p.

    That is the square of the change of the output o to first order in p_i. Tokens are read a chunk at a time: once for the
    outputs and the log-sum-exps of the queries, once for the scores. No tensor grows with queries times tokens.

    Args:
        query: [B, H, W, D], rotated queries of the last W positions.
        keys, values: [B, H_kv, T, D].
        valid: bool [B, T], false at padding.
        scaling: factor of the logits.

    Returns scores fp32 [B, H_kv, T]. A query that sees nothing counts as 0.

    Raises ValueError if the shapes do not fit.
    """
    _check(query, keys, values, valid)
    batch, kv_heads, tokens, head_dim = keys.shape
    window = query.shape[2]
    rows = query.float().reshape(batch, kv_heads, -1, head_dim) * scaling  # [B, H_kv, G * W, D]
    chunk = max(1, CHUNK_BYTES // (4 * rows[..., 0].numel()))
    chunks = [slice(begin, min(begin + chunk, tokens)) for begin in range(0, tokens, chunk)]
    lse = torch.full(rows.shape[:3], -torch.inf, dtype=torch.float32, device=rows.device)
    output = torch.zeros_like(rows)
    for part in chunks:
        logits = _logits(rows, keys, valid, part, window)
        joint = torch.logaddexp(lse, torch.logsumexp(logits, -1))
        shift = joint.masked_fill(joint == -torch.inf, 0.0)
        output *= torch.exp(lse - shift)[..., None]
        weights = logits.sub_(shift[..., None]).exp_()  # [B, H_kv, G * W, chunk]
        output += weights @ values[:, :, part].float()
        lse = joint
    scores = torch.empty(batch, kv_heads, tokens, dtype=torch.float32, device=rows.device)
    shift = lse.masked_fill(lse == -torch.inf, 0.0)
    output_norm = output.square().sum(-1, keepdim=True)
    for part in chunks:
        if len(chunks) > 1:  # the weights of a single chunk are still there
            weights = _logits(rows, keys, valid, part, window).sub_(shift[..., None]).exp_()
        squared = weights.square_()
        some = values[:, :, part].float()
        cross = (squared.transpose(2, 3) @ output * some).sum(-1)
        of_values = squared.sum(2) * some.square().sum(-1)
        scores[:, :, part] = of_values - 2 * cross + (squared * output_norm).sum(2)
    return scores.clamp_(min=0).div_(rows.shape[2])


def _logits(rows: Tensor, keys: Tensor, valid: Tensor, part: slice, window: int) -> Tensor:
    """Logits fp32 [B, H_kv, G * W, chunk], -inf where a query does not see a token."""
    tokens = keys.shape[2]
    position = torch.arange(part.start, part.stop, device=keys.device)
    causal = position <= torch.arange(tokens - window, tokens, device=keys.device)[:, None]  # [W, chunk]
    visible = (causal & valid[:, None, part]).repeat(1, rows.shape[2] // window, 1)[:, None]  # [B, 1, G * W, chunk]
    return (rows @ keys[:, :, part].float().transpose(2, 3)).masked_fill_(~visible, -torch.inf)


def _check(query: Tensor, keys: Tensor, values: Tensor, valid: Tensor) -> None:
    batch, heads, window, head_dim = query.shape
    kv_heads, tokens = keys.shape[1:3]
    if keys.shape != (batch, kv_heads, tokens, head_dim) or values.shape != keys.shape or heads % kv_heads or window > tokens:
        raise ValueError(
            f"query {list(query.shape)}, keys {list(keys.shape)} and values {list(values.shape)} do not fit: expected "
            "[B, H, W, D] with W <= T, and twice [B, H_kv, T, D] with H a multiple of H_kv"
        )
    if valid.shape != (batch, tokens) or valid.dtype != torch.bool:
        raise ValueError(f"expected valid bool [{batch}, {tokens}], got {valid.dtype} {list(valid.shape)}")
