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
from ib_kernels import SideName, merge, partial_attention
from torch import Tensor
from transformers import Cache

from ib_analysis.cache.attention import borrowed, cache_argument, causal_mask
from ib_analysis.cache.plan import HeadPlan
from ib_analysis.errors import UnsupportedModelError
from ib_analysis.replay.replay import SIDES, Replay, ReplayLayer
from ib_analysis.search.output_changes import Attending, output_changes

SAMPLES = 4  # draws of the next tokens for one prompt
HELD_ELEMENTS = 2**20  # of weights and values of one precision; some 30 precisions and shares are held at once


def gradient_losses(replay: Replay, options: Sequence[HeadPlan], generator: torch.Generator) -> Tensor:
    """Predicted loss in bits per predicted token: float64 [heads, options], heads in the order of `shape.heads`."""
    answered, gradients = score_gradients(replay, generator)
    with torch.no_grad():
        chunks = heads_alike(replay, answered)
        changes = [output_changes(attending(replay, heads, answered, gradients), options) for heads in chunks]
    device = replay.example.followup.device
    nats = torch.cat([(change.square().mean(1) / 2).to(device) for change in changes])  # over all predicted tokens
    return nats / (len(replay.example.predicting) * math.log(2))


def heads_alike(replay: Replay, answered: dict[int, ReplayLayer]) -> list[list[tuple[int, int]]]:
    """All heads in order, neighbours together whose layers are computed alike, as many as memory allows."""
    chunks: list[list[tuple[int, int]]] = []
    before: Any = None
    for layer, head in replay.spec.shape.heads:
        one, shape = answered[layer], replay.spec.shape.layers[layer]
        rows = one.query.shape[1:3].numel() // shape.kv_heads  # G * M
        kind = (shape, rows, one.scaling, one.extras.get("softcap"), one.query.device)
        max_heads = max(1, HELD_ELEMENTS // ((rows + 2 * shape.head_dim) * replay.length))
        if kind != before or len(chunks[-1]) == max_heads:
            chunks.append([])
        before = kind
        chunks[-1].append((layer, head))
    return chunks


def score_gradients(replay: Replay, generator: torch.Generator) -> tuple[dict[int, ReplayLayer], dict[int, Tensor]]:
    """Layers after an uncompressed follow-up, and for each the gradients [S, H, M, D] of the sampled tokens' log-probability."""
    text = replay.model.config.get_text_config(decoder=True)
    followup = replay.example.followup
    probes = {
        i: torch.zeros(
            (1, text.num_attention_heads, len(followup), replay.spec.shape.layers[i].head_dim),
            dtype=replay.context(i).keys.dtype,
            device=replay.context(i).keys.device,
        ).requires_grad_()
        for i in replay.spec.shape.compressible
    }
    layers = replay.followup_layers([[None]] * len(replay.layers), probes)
    with torch.enable_grad():
        cache = cache_argument(replay.model, Cache(layers=layers))
        with borrowed(replay.model):
            logits = replay.model(followup[None], **cache, logits_to_keep=replay.example.predicting.tolist()).logits[0]
        log_probs = logits.float().log_softmax(-1)
        drawn = torch.multinomial(log_probs.detach().exp(), SAMPLES, replacement=True, generator=generator)  # [Y, S]
        gradients = [
            torch.autograd.grad(
                log_probs.gather(1, drawn[:, s : s + 1]).sum(), list(probes.values()), retain_graph=True, allow_unused=True
            )
            for s in range(SAMPLES)
        ]
    if any(gradient is None for gradient in gradients[0]):
        raise UnsupportedModelError(
            f"layers of this {type(replay.model).__name__} pass no gradients on, as 4-bit weights of bitsandbytes on some CPUs: "
            "calibrate it on a GPU, or without quantized weights"
        )
    stacked = {i: torch.cat([sample[n] for sample in gradients]).float() for n, i in enumerate(probes)}
    return {i: layer for i, layer in enumerate(layers) if isinstance(layer, ReplayLayer)}, stacked


def attending(
    replay: Replay, heads: list[tuple[int, int]], answered: dict[int, ReplayLayer], gradients: dict[int, Tensor]
) -> Attending:
    """Heads alike, after an uncompressed follow-up."""
    layers = dict.fromkeys(layer for layer, _ in heads)
    one = answered[heads[0][0]]
    kv_heads, head_dim = one.new_keys.shape[1], one.new_keys.shape[3]
    rows = kv_heads, -1, head_dim  # G * M rows of each KV head
    queries = {layer: answered[layer].query.detach()[0].float().reshape(rows) for layer in layers}
    outputs = {layer: answered[layer].output.detach()[0].float().reshape(rows) for layer in layers}
    by_head = {layer: gradients[layer].reshape(SAMPLES, *rows) for layer in layers}
    contexts = {layer: replay.context(layer) for layer in layers}
    keys = torch.stack([contexts[layer].keys[h] for layer, h in heads])  # [U, N, D]
    values = torch.stack([contexts[layer].values[h] for layer, h in heads])
    ranks = torch.stack([replay.ranks[layer][h] for layer, h in heads])  # [U, N]
    query = torch.stack([queries[layer][h] for layer, h in heads])  # [U, G * M, D]
    rest = replay.first + replay.tokens
    compressible = slice(replay.first, rest)
    return Attending(
        query=query,
        keys=keys[:, compressible].float(),
        values=values[:, compressible].float(),
        order=ranks[:, compressible].argsort(1),
        exact=_exact(replay, heads, answered, query),
        full=torch.stack([outputs[layer][h] for layer, h in heads]),
        directions=torch.stack([by_head[layer][:, h] for layer, h in heads]),
        scaling=one.scaling,
        softcap=one.extras.get("softcap"),
        dtype=replay.dtype,
        bases=None if replay.spec.bases is None else replay.spec.bases.of(heads).to(keys.device),
    )


def _exact(
    replay: Replay,
    heads: list[tuple[int, int]],
    answered: dict[int, ReplayLayer],
    query: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attention of U heads to what no plan changes: sinks, windows, the follow-up itself, a learnt sink."""
    one, rest = answered[heads[0][0]], replay.first + replay.tokens
    new_keys = torch.stack([answered[layer].new_keys.detach()[0, h] for layer, h in heads])
    new_values = torch.stack([answered[layer].new_values.detach()[0, h] for layer, h in heads])
    recent = torch.tensor([*range(replay.first), *range(rest, replay.length)], device=new_keys.device)
    keys, values = (
        torch.cat([_of_heads(replay, side, heads)[:, recent], new.float()], dim=1)
        for side, new in zip(SIDES, (new_keys, new_values))
    )
    length = new_keys.shape[1]
    groups = query.shape[1] // length
    visible = causal_mask(length, keys.shape[1], keys.device)[0].repeat(1, groups, 1).expand(len(keys), -1, -1)
    out, lse = partial_attention(query, keys, values, visible, one.scaling, one.extras.get("softcap"))
    if one.extras.get("s_aux") is None:
        return out, lse
    learnt = [answered[layer].extras["s_aux"].detach().float().view(-1, groups)[h] for layer, h in heads]
    sink_lse = torch.stack(learnt)[:, :, None].expand(-1, -1, length).reshape(lse.shape)
    return merge([out, torch.zeros_like(out)], [lse, sink_lse])


def _of_heads(replay: Replay, side: SideName, heads: list[tuple[int, int]]) -> Tensor:
    """Keys or values of these heads, where their windows are as heads with a plan keep them: fp32 [U, N, D]."""
    layers = {layer: replay.with_windows(layer, side) for layer, _ in heads}
    return torch.stack([layers[layer][h] for layer, h in heads])
