"""Losses by the gradient: what every option of every head would cost, from one forward pass and a few backward passes.

At each predicting position a next token is sampled from the model itself, and the score of the samples is differentiated
with respect to every head's output: g. An option changes that output by d. To second order the KL divergence is
E[(g . d)^2] / 2, because the Fisher information is the mean square of the score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from ib_kernels import SideName, get_format, merge, partial_attention, roundtrip
from torch import Tensor
from transformers import Cache

from ib_analysis.cache.attention import borrowed, cache_argument
from ib_analysis.cache.plan import HeadPlan
from ib_analysis.cache.tiers import taken
from ib_analysis.replay.replay import Replay, ReplayLayer

SAMPLES = 4  # draws of the next tokens for one prompt
HELD_ELEMENTS = 2**22  # of weights and values of one precision; some 30 precisions and shares are held at once


def gradient_losses(replay: Replay, options: Sequence[HeadPlan], generator: torch.Generator) -> Tensor:
    """Predicted loss in bits per predicted token: float64 [heads, options], heads in the order of `shape.heads`."""
    answered, gradients = _score_gradients(replay, generator)
    rows = [_losses(replay, heads, answered, gradients, options) for heads in _alike(replay, answered)]
    return torch.cat(rows) / (len(replay.example.predicting) * math.log(2))


def _alike(replay: Replay, answered: dict[int, ReplayLayer]) -> list[list[tuple[int, int]]]:
    """All heads in order, neighbours together whose layers are computed alike, as many as memory allows."""
    chunks: list[list[tuple[int, int]]] = []
    before: Any = None
    for layer, head in replay.spec.shape.heads:
        rows = answered[layer].query.shape[1:3].numel() // replay.spec.shape.layers[layer].kv_heads  # G * M
        kind = (replay.spec.shape.layers[layer], rows, answered[layer].scaling, answered[layer].extras.get("softcap"))
        max_heads = max(1, HELD_ELEMENTS // ((rows + 2 * replay.spec.shape.layers[layer].head_dim) * replay.length))
        if kind != before or len(chunks[-1]) == max_heads:
            chunks.append([])
        before = kind
        chunks[-1].append((layer, head))
    return chunks


def _score_gradients(replay: Replay, generator: torch.Generator) -> tuple[dict[int, ReplayLayer], dict[int, Tensor]]:
    """Layers after an uncompressed follow-up, and for each the gradients [S, H, M, D] of the sampled tokens' log-probability."""
    text = replay.model.config.get_text_config(decoder=True)
    followup = replay.example.followup
    probes = {
        i: torch.zeros(
            (1, text.num_attention_heads, len(followup), replay.spec.shape.layers[i].head_dim),
            dtype=replay.model.dtype,
            device=followup.device,
        ).requires_grad_()
        for i in replay.spec.shape.compressible
    }
    layers = replay.followup_layers([[None] * len(replay.layers)], probes)
    with torch.enable_grad():
        cache = cache_argument(replay.model, Cache(layers=layers))
        with borrowed(replay.model):
            logits = replay.model(followup[None], **cache).logits[0, replay.example.predicting]
        log_probs = logits.float().log_softmax(-1)
        drawn = torch.multinomial(log_probs.detach().exp(), SAMPLES, replacement=True, generator=generator)  # [Y, S]
        gradients = [
            torch.autograd.grad(log_probs.gather(1, drawn[:, s : s + 1]).sum(), list(probes.values()), retain_graph=True)
            for s in range(SAMPLES)
        ]
    stacked = {i: torch.cat([sample[n] for sample in gradients]).float() for n, i in enumerate(probes)}
    return {i: layer for i, layer in enumerate(layers) if isinstance(layer, ReplayLayer)}, stacked


class _Attended:
    """Attention of U heads' follow-up queries to tiers of their contexts, each computed once."""

    def __init__(self, replay: Replay, heads: list[tuple[int, int]], answered: dict[int, ReplayLayer]) -> None:
        contexts = {layer: replay.context(layer) for layer, _ in heads}
        self.keys = torch.stack([contexts[layer].keys[h] for layer, h in heads])  # [U, N, D]
        self.values = torch.stack([contexts[layer].values[h] for layer, h in heads])
        self.ranks = torch.stack([replay.ranks[layer][h] for layer, h in heads])  # [U, N]
        one = answered[heads[0][0]]
        self.dtype, self.scaling, self.softcap = replay.dtype, one.scaling, one.extras.get("softcap")
        kv_heads, head_dim = one.new_keys.shape[1], self.keys.shape[-1]
        queries = {layer: answered[layer].query.detach()[0].reshape(kv_heads, -1, head_dim) for layer in contexts}
        self.query = torch.stack([queries[layer][h] for layer, h in heads])  # [U, G * M, D]
        self.first, self.tokens = replay.first, replay.tokens
        self.exact = self._exact(heads, answered)
        self._weights: dict[tuple[str, int, int, int], tuple[Tensor, Tensor]] = {}
        self._values: dict[tuple[str, int], Tensor] = {}
        self._rows: dict[tuple[int, int], Tensor] = {}

    def _exact(self, heads: list[tuple[int, int]], answered: dict[int, ReplayLayer]) -> tuple[Tensor, Tensor]:
        """What is never compressed: sinks, window, the follow-up itself, a learnt sink."""
        new_keys = torch.stack([answered[layer].new_keys.detach()[0, h] for layer, h in heads])
        new_values = torch.stack([answered[layer].new_values.detach()[0, h] for layer, h in heads])
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
        if answered[heads[0][0]].extras.get("s_aux") is None:
            return out, lse
        learnt = [answered[layer].extras["s_aux"].detach().float().view(-1, groups)[h] for layer, h in heads]
        sink_lse = torch.stack(learnt)[:, :, None].expand(-1, -1, length).reshape(lse.shape)
        return merge([out, torch.zeros_like(out)], [lse, sink_lse])

    def output(self, plan: HeadPlan) -> Tensor:
        """Output [U, G * M, D] of every head under this plan."""
        outs, lses = [self.exact[0]], [self.exact[1]]
        edges = plan.edges(self.tokens)
        for tier, begin, end in zip(plan.tiers, edges, edges[1:]):
            if begin < end:
                weights, lse = self._attention(plan.format, begin, end, tier.key_bits)
                outs.append(weights @ self._dequantized_values(plan.format, begin, end, tier.value_bits))
                lses.append(lse)
        return merge(outs, lses)[0]

    def _taken(self, begin: int, end: int) -> Tensor:
        """Positions of the tokens ranked from `begin` to before `end`: [U, n, D], to gather with."""
        if (begin, end) not in self._rows:
            self._rows[begin, end] = taken(self.ranks, begin, end)[..., None].expand(-1, -1, self.keys.shape[-1])
        return self._rows[begin, end]

    def _attention(self, fmt: str, begin: int, end: int, bits: int) -> tuple[Tensor, Tensor]:
        """Weights [U, G * M, n] that sum to one, and log-sum-exp [U, G * M]."""
        key = (fmt, begin, end, bits)
        if key not in self._weights:
            rows = self.keys.gather(1, self._taken(begin, end))
            keys = self._roundtrip(fmt, "keys", rows, bits)
            logits = self.query.float() @ keys.transpose(1, 2) * self.scaling
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            self._weights[key] = logits.softmax(-1), logits.logsumexp(-1)
        return self._weights[key]

    def _dequantized_values(self, fmt: str, begin: int, end: int, bits: int) -> Tensor:
        """Values [U, n, D]. Where each token is quantized by itself, all are done once, whichever are taken."""
        rows = self._taken(begin, end)
        if any(shape.tokens_per_row != 1 for shape in get_format(fmt).values.metadata(self.values.shape[-1]).values()):
            return self._roundtrip(fmt, "values", self.values.gather(1, rows), bits)
        if (fmt, bits) not in self._values:
            self._values[fmt, bits] = self._roundtrip(fmt, "values", self.values, bits)
        return self._values[fmt, bits].gather(1, rows)

    def _roundtrip(self, fmt: str, side: SideName, x: Tensor, bits: int) -> Tensor:
        """Keys or values [U, n, D] after quantization, each head one run."""
        lengths = torch.full((len(x),), x.shape[1], device=x.device)
        return roundtrip(fmt, side, x.flatten(0, 1), lengths, bits, self.dtype).view(x.shape)


@torch.no_grad()
def _losses(
    replay: Replay,
    heads: list[tuple[int, int]],
    answered: dict[int, ReplayLayer],
    gradients: dict[int, Tensor],
    options: Sequence[HeadPlan],
) -> Tensor:
    """Mean over samples of (g . d)^2 / 2, in nats over all predicted tokens: float64 [U, options]."""
    attended = _Attended(replay, heads, answered)
    kv_heads = answered[heads[0][0]].new_keys.shape[1]
    rows = kv_heads, *attended.query.shape[1:]
    outputs = {layer: answered[layer].output.detach()[0].float().reshape(rows) for layer, _ in heads}
    full = torch.stack([outputs[layer][h] for layer, h in heads])  # [U, G * M, D]
    by_head = torch.stack([gradients[layer].reshape(SAMPLES, kv_heads, -1)[:, h] for layer, h in heads])  # [U, S, G * M * D]
    losses = []
    for plan in options:
        change = (attended.output(plan) - full).flatten(1)  # [U, G * M * D]
        projected = (by_head @ change[..., None])[..., 0].double()  # [U, S]
        losses.append(projected.square().mean(1) / 2)
    return torch.stack(losses, dim=1)
