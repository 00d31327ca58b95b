"""Attention over a part of the keys, and the exact merge of parts by their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor


def partial_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of P runs over T keys each, computed in float32.

    Args:
        query: [P, R, D], R query rows (grouped heads times positions) that attend to the same run.
        keys, values: [P, T, D]; T may be 0. Masked slots must hold finite numbers.
        mask: bool [P, R or 1, T], true where a row sees a key.
        scaling: factor of the logits, usually 1 / sqrt(D).
        softcap: if given, logits become softcap * tanh(logits / softcap) (Gemma 2).

    Returns:
        (out fp32 [P, R, D], natural log-sum-exp of the logits fp32 [P, R]). A row that sees nothing gives 0 and -inf.

    Raises ValueError if the shapes do not fit or the mask is not boolean.
    """
    _check(query, keys, values, mask)
    logits = (query.float() @ keys.float().transpose(1, 2)).mul_(scaling)  # [P, R, T]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill_(~mask, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)  # [P, R]
    weights = (logits - _finite(lse)[..., None]).exp_()
    return weights @ values.float(), lse


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint parts, from each part's (out [P, R, D], log-sum-exp [P, R]).

    Returns (out [P, R, D], log-sum-exp [P, R]); a row that no part sees gives 0 and -inf.
    Raises ValueError if the lists are empty or differ in length.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"got {len(outs)} outputs and {len(lses)} log-sum-exps: pass one of each for every part")
    if len(outs) == 1:
        return outs[0], lses[0]
    stacked = torch.stack(lses)  # [parts, P, R]
    lse = torch.logsumexp(stacked, dim=0)
    weights = torch.exp(stacked - _finite(lse))
    out = torch.zeros_like(outs[0])
    for weight, part in zip(weights, outs, strict=True):
        out += weight[..., None] * part
    return out, lse


def _finite(lse: Tensor) -> Tensor:
    # -inf - (-inf) is NaN; with 0 in its place, exp(-inf - 0) = 0 is what a row that sees nothing needs.
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _check(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> None:
    runs, rows, head_dim = query.shape
    tokens = keys.shape[1]
    if keys.shape != (runs, tokens, head_dim) or values.shape[:2] != (runs, tokens):
        raise ValueError(
            f"keys {list(keys.shape)} and values {list(values.shape)} do not fit query {list(query.shape)}: "
            "expected query [P, R, D], keys [P, T, D], values [P, T, D]"
        )
    if mask.dtype != torch.bool or mask.shape not in ((runs, rows, tokens), (runs, 1, tokens)):
        raise ValueError(
            f"expected a boolean mask [{runs}, {rows} or 1, {tokens}], true where visible, got {mask.dtype} {list(mask.shape)}"
        )
