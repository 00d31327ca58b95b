"""ExpectedAttention (Devoto et al. 2025, arXiv 2510.00636): the attention that queries still to come would pay on average."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ib_analysis.scorers.positions import at_last_position, frequencies, turned
from ib_analysis.scorers.scorer import CHUNK_BYTES


@dataclass(frozen=True)
class ExpectedAttention:
    """The mean softmax weight over Gaussian queries at the next `future` positions, times the norm of the value.

    Queries have the mean and covariance of those of the block. The first `sinks` tokens do not count, and come first.
    """

    future: int = 512
    sinks: int = 4

    @torch.no_grad()
    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        """See `Scorer`. Raises UnsupportedModelError unless positions rotate all channels, as in Llama."""
        (batch, heads, length, head_dim), kv_heads = query.shape, keys.shape[1]
        counted = _beyond(valid, self.sinks)  # [B, T]
        used = counted[:, -length:][:, None, :, None]  # [B, 1, M, 1]
        count = used.sum(2, keepdim=True).clamp(min=1)
        at_last = at_last_position(module, query)
        mean = (at_last * used).sum(2, keepdim=True) / count  # [B, H, 1, D]
        centred = (at_last - mean) * used
        covariance = centred.mT @ centred / count  # [B, H, D, D]
        ahead = torch.arange(1, self.future + 1, device=query.device)
        eye = torch.eye(head_dim, device=query.device)
        turn = turned(eye[:, None], ahead, frequencies(module, query)).mean(1)  # [D, D]: what x becomes on average is x @ turn
        mean = (mean @ turn).reshape(batch, kv_heads, -1, 1, head_dim)  # [B, H_kv, G, 1, D]
        covariance = (turn.T @ covariance @ turn).reshape(batch, kv_heads, -1, head_dim, head_dim)
        size = max(1, CHUNK_BYTES // (4 * batch * heads * head_dim))
        parts = [part.float()[:, :, None] * scaling for part in keys.split(size, 2)]  # of [B, H_kv, 1, t, D]
        logits = torch.cat([(mean @ part.mT)[..., 0, :] + (part @ covariance * part).sum(-1) / 2 for part in parts], -1)
        weights = logits.masked_fill(~counted[:, None, None], -torch.inf).softmax(-1).mean(2)
        scores = weights * values.float().norm(dim=-1)
        return scores.where(counted[:, None], scores.amax((1, 2), keepdim=True))


def _beyond(valid: Tensor, sinks: int) -> Tensor:
    """Tokens that are no padding, but for the first `sinks` of a sequence that has more: bool [B, T]."""
    place = valid.cumsum(1)
    return valid & ((place > sinks) | (place[:, -1:] <= sinks))
