"""Gradient prices: what every option of every head would cost, from one forward pass and a few backward passes.

At each predicting position a next token is sampled from the model itself, and the score of the samples is differentiated
with respect to every head's output: g. An option changes that output by d. To second order the KL divergence is
E[(g . d)^2] / 2, because the Fisher information is the mean square of the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from ib_kernels import merge, partial_attention
from torch import Tensor
from transformers import Cache

from ib_analysis.attention import cache_argument
from ib_analysis.formats.packed import roundtrip_keys, roundtrip_values
from ib_analysis.plan import HeadPlan
from ib_analysis.replay import Replay, ReplayLayer

SAMPLES = 4  # draws of the next tokens for one prompt


def gradient_prices(replay: Replay, options: Sequence[HeadPlan], generator: torch.Generator) -> Tensor:
    """Predicted loss in bits per predicted token: float64 [heads, options], heads in the order of `shape.heads`."""
    layers, gradients = _score_gradients(replay, generator)
    rows = [_layer_prices(replay, i, layers[i], gradients[i], options) for i in replay.shape.compressible]
    return torch.cat(rows) / (len(replay.episode.predicting) * math.log(2))


def _score_gradients(replay: Replay, generator: torch.Generator) -> tuple[dict[int, ReplayLayer], dict[int, Tensor]]:
    """Layers after an uncompressed follow-up, and for each the gradients [S, H, M, D] of the sampled tokens' log-probability."""
    text = replay.model.config.get_text_config(decoder=True)
    followup = replay.episode.followup
    probes = {
        i: torch.zeros(
            1, text.num_attention_heads, len(followup), replay.shape.layers[i].head_dim, device=followup.device
        ).requires_grad_()
        for i in replay.shape.compressible
    }
    layers = replay.followup_layers([[None] * len(replay.layers)], probes)
    with torch.enable_grad():
        cache = cache_argument(replay.model, Cache(layers=layers))
        logits = replay.model(followup[None], **cache).logits[0, replay.episode.predicting]
        log_probs = logits.float().log_softmax(-1)
    drawn = torch.multinomial(log_probs.detach().exp(), SAMPLES, replacement=True, generator=generator)  # [Y, S]
    gradients = [
        torch.autograd.grad(log_probs.gather(1, drawn[:, s : s + 1]).sum(), list(probes.values()), retain_graph=True)
        for s in range(SAMPLES)
    ]
    stacked = {i: torch.cat([sample[n] for sample in gradients]) for n, i in enumerate(probes)}
    return {i: layer for i, layer in enumerate(layers) if isinstance(layer, ReplayLayer)}, stacked


class _Parts:
    """Attention of a layer's follow-up queries to parts of its context, each computed once."""

    def __init__(self, replay: Replay, layer: int, answered: ReplayLayer) -> None:
        context = replay.context(layer)
        self.keys, self.values, self.dtype = context.keys, context.values, replay.dtype
        kv_heads = self.keys.shape[0]
        self.query = answered.query.detach()[0].reshape(kv_heads, -1, self.keys.shape[-1])  # [H_kv, G * M, D]
        self.scaling, self.softcap = answered.scaling, answered.extras.get("softcap")
        self.first = min(replay.pinned.sinks, replay.length)
        self.tokens = replay.pinned.compressible(replay.length)
        self.ranked = context.scores[:, self.first : self.first + self.tokens].argsort(dim=1, descending=True, stable=True)
        self.exact = self._exact(replay, answered)
        self._weights: dict[tuple[str, int, int, int], tuple[Tensor, Tensor]] = {}
        self._values: dict[tuple[str, int, int, int], Tensor] = {}
        self._rows: dict[tuple[int, int], Tensor] = {}

    def _exact(self, replay: Replay, answered: ReplayLayer) -> tuple[Tensor, Tensor]:
        """The part that is never compressed: sinks, window, the follow-up itself, a learnt sink."""
        new_keys, new_values = answered.new_keys.detach()[0], answered.new_values.detach()[0]
        rest = self.first + self.tokens
        keys = torch.cat([self.keys[:, : self.first], self.keys[:, rest:], new_keys], dim=1)
        values = torch.cat([self.values[:, : self.first], self.values[:, rest:], new_values], dim=1)
        length = new_keys.shape[1]
        position = torch.arange(keys.shape[1], device=keys.device)
        visible = position <= position[keys.shape[1] - length :, None]  # [M, T]
        groups = self.query.shape[1] // length
        out, lse = partial_attention(
            self.query, keys, values, visible.repeat(groups, 1).expand(len(keys), -1, -1), self.scaling, self.softcap
        )
        sink = answered.extras.get("s_aux")
        if sink is None:
            return out, lse
        sink_lse = sink.detach().float().reshape(len(keys), groups, 1).expand(-1, -1, length).reshape(lse.shape)
        return merge([out, torch.zeros_like(out)], [lse, sink_lse])

    def output(self, plan: HeadPlan) -> Tensor:
        """Output [H_kv, G * M, D] of every head under this plan."""
        outs, lses = [self.exact[0]], [self.exact[1]]
        begin = 0
        for tier, count in zip(plan.tiers, plan.counts(self.tokens)):
            if count:
                weights, lse = self._attention(plan.format, begin, count, tier.key_bits)
                outs.append(weights @ self._dequantized_values(plan.format, begin, count, tier.value_bits))
                lses.append(lse)
            begin += count
        return merge(outs, lses)[0]

    def _taken(self, begin: int, count: int) -> Tensor:
        """Positions of the tokens ranked from `begin`: [H_kv, n, D], to gather with."""
        if (begin, count) not in self._rows:
            taken = self.first + self.ranked[:, begin : begin + count].sort(dim=1).values
            self._rows[begin, count] = taken[..., None].expand(-1, -1, self.keys.shape[-1])
        return self._rows[begin, count]

    def _roundtrip(self, roundtrip: Callable[..., Tensor], fmt: str, x: Tensor, begin: int, count: int, bits: int) -> Tensor:
        """Rows [H_kv, n, D] of x [H_kv, N, D] after compression."""
        rows = x.gather(1, self._taken(begin, count))
        lengths = torch.full((len(x),), count, device=x.device)
        return roundtrip(fmt, rows.flatten(0, 1), lengths, bits, self.dtype).view(rows.shape)

    def _attention(self, fmt: str, begin: int, count: int, bits: int) -> tuple[Tensor, Tensor]:
        """Weights [H_kv, G * M, n] that sum to one, and log-sum-exp [H_kv, G * M]."""
        key = (fmt, begin, count, bits)
        if key not in self._weights:
            keys = self._roundtrip(roundtrip_keys, fmt, self.keys, begin, count, bits)
            logits = self.query.float() @ keys.transpose(1, 2) * self.scaling
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            self._weights[key] = logits.softmax(-1), logits.logsumexp(-1)
        return self._weights[key]

    def _dequantized_values(self, fmt: str, begin: int, count: int, bits: int) -> Tensor:
        key = (fmt, begin, count, bits)
        if key not in self._values:
            self._values[key] = self._roundtrip(roundtrip_values, fmt, self.values, begin, count, bits)
        return self._values[key]


@torch.no_grad()
def _layer_prices(replay: Replay, layer: int, answered: ReplayLayer, gradients: Tensor, options: Sequence[HeadPlan]) -> Tensor:
    """Mean over samples of (g . d)^2 / 2, in nats over all predicted tokens: float64 [H_kv, options]."""
    parts = _Parts(replay, layer, answered)
    full = answered.output.detach()[0].reshape(parts.query.shape)
    by_head = gradients.reshape(gradients.shape[0], *parts.query.shape).movedim(0, 1).flatten(2)  # [H_kv, S, G * M * D]
    prices = []
    for plan in options:
        change = (parts.output(plan) - full).flatten(1)  # [H_kv, G * M * D]
        projected = (by_head @ change[..., None])[..., 0].double()  # [H_kv, S]
        prices.append(projected.square().mean(1) / 2)
    return torch.stack(prices, dim=1)
