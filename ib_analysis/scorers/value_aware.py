"""Value-aware attention: how far a token moves the head's output, root mean square over the observed queries."""

from __future__ import annotations

from torch import Tensor

from ib_analysis.scorers.scorer import observed_weights


def value_aware(query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
    """Mean over queries of p_i^2 |v_i - o|^2, the square of the output's change to first order in p_i (see `Scorer`).

    |v - o|^2 is expanded, so that nothing of shape [queries, T, D] is held.
    """
    weights = observed_weights(query, keys, valid, scaling)  # [B, H_kv, Q, T]
    values = values.float()
    output = weights @ values  # [B, H_kv, Q, D]
    squared = weights.square()
    cross = (squared.transpose(2, 3) @ output * values).sum(-1)  # [B, H_kv, T]
    from_output = (squared * output.square().sum(-1, keepdim=True)).sum(2)
    from_values = squared.sum(2) * values.square().sum(-1)
    return (from_values - 2 * cross + from_output).clamp(min=0) / weights.shape[2]
