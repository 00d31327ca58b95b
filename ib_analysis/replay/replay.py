"""One example replayed under many plans at once: what a compressed cache would predict, without building each cache.

The prefill does not depend on the plan. So its keys and values are computed once, every plan is applied to them
(quantized and dequantized, evicted tokens masked), and all plans go through the model as one batch. The result is that
of `CompressedCache`, up to the rounding of floating-point sums.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from ib_kernels import Bases, SideName, in_bases, partial_attention, roundtrip
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ib_analysis.cache.attention import (
    AnsweringLayer,
    borrowed,
    cache_argument,
    causal_mask,
    finish,
    full_attention,
    grouped_attention,
)
from ib_analysis.cache.plan import QUANTIZED_FORM, HeadPlan, LayerPlans, PlansToTry
from ib_analysis.cache.rereading import reread_scores
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.cache.tiers import ranks
from ib_analysis.errors import CalibrationError, UnsupportedModelError
from ib_analysis.model.decoder import decoder_layers
from ib_analysis.replay.examples import Example
from ib_analysis.replay.growing import growing, growth
from ib_analysis.scorers import RereadingScorer, Scorer

SIDES: tuple[SideName, SideName] = ("keys", "values")
LOGIT_ELEMENTS = 2**24  # over all plans of a batch
BATCH_ELEMENTS = 2**21  # keys of one layer, over all plans of a batch: few enough to stay in a CPU's cache


class ContextLayer(CacheLayerMixin, AnsweringLayer):
    """Records the context's keys and values [H_kv, N, D] and the scores [H_kv, N] of its tokens."""

    is_sliding = False

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer = scorer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.keys, self.values = key_states, value_states
        return self, self

    def attend(self, module: nn.Module, query: Tensor, mask: Tensor | None, scaling: float, extras: dict[str, Any]) -> Tensor:
        out = full_attention(module, query, self.keys, self.values, mask, scaling, extras)
        valid = torch.ones(1, self.keys.shape[2], dtype=torch.bool, device=self.keys.device)
        self.scores = self.scorer(module, query, self.keys, self.values, valid, scaling)[0]
        self.keys, self.values = self.keys[0], self.values[0]
        return out

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1


@dataclass(frozen=True, eq=False)
class ContextPart:
    """Versions of heads' contexts, W of them, each of which n (plan, head) pairs share."""

    keys: Tensor  # [W, N, D]
    values: Tensor  # [W, N, D]
    kept: Tensor  # bool [W, N], the tokens that are visible
    pairs: Tensor  # int64 [W, n], plan * H_kv + head


class ReplayLayer(CacheLayerMixin, AnsweringLayer):
    """Answers from the parts of a context, which together serve every plan and head, and from the follow-up's own keys.

    `probe` [1, H, M, D], if given, is added to the output: its gradient is that of the heads' output. After the follow-up
    the layer has its `query`, `new_keys`, `new_values`, `output`, and how it was computed.
    """

    is_sliding = False

    def __init__(self, parts: list[ContextPart], length: int, probe: Tensor | None = None) -> None:
        super().__init__()
        self.parts, self.length, self.probe = parts, length, probe
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.new_keys, self.new_values = key_states, value_states
        return self, self

    def attend(self, module: nn.Module, query: Tensor, mask: Tensor | None, scaling: float, extras: dict[str, Any]) -> Tensor:
        length = query.shape[2]
        self.query = query
        context = self._attend_context(query, scaling, extras)
        own_mask = causal_mask(length, length, query.device)
        own = grouped_attention(query, self.new_keys, self.new_values, own_mask, scaling, extras)
        self.scaling, self.extras = scaling, extras
        self.output = finish([context[0], own[0]], [context[1], own[1]], query, extras)
        return self.output if self.probe is None else self.output + self.probe

    def _attend_context(self, query: Tensor, scaling: float, extras: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Attention to the context, as `grouped_attention`. Pairs that share a context are rows of one product."""
        kv_heads, head_dim = self.new_keys.shape[1], query.shape[-1]
        rows = query.reshape(len(query) * kv_heads, -1, head_dim)  # [P, G * M, D]
        outs, lses = [], []
        for part in self.parts:
            runs = rows[part.pairs].flatten(1, 2)  # [W, n * G * M, D]
            out, lse = partial_attention(runs, part.keys, part.values, part.kept[:, None], scaling, extras.get("softcap"))
            outs.append(out.reshape(-1, *rows.shape[1:]))
            lses.append(lse.reshape(-1, rows.shape[1]))
        order = torch.cat([part.pairs.flatten() for part in self.parts]).argsort()
        return torch.cat(outs)[order], torch.cat(lses)[order]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1


class Replay:
    """An example after its prefill, ready to be continued under any plan."""

    def __init__(self, model: PreTrainedModel, spec: CacheSpec, example: Example) -> None:
        self.model, self.spec, self.example = model, spec, example
        self.length = len(example.prefill)
        self.first = min(spec.recent.sinks, self.length)  # the first compressible token
        self.tokens = spec.recent.compressible(self.length)
        self.dtype = model.dtype if model.dtype in (torch.float16, torch.bfloat16) else torch.float16
        self.layers: list[CacheLayerMixin] = [
            DynamicSlidingWindowLayer(sliding_window=layer.sliding_window) if layer.sliding_window else ContextLayer(spec.scorer)
            for layer in spec.shape.layers
        ]
        try:
            with torch.no_grad(), borrowed(model):
                model(example.prefill[None], **cache_argument(model, Cache(layers=self.layers)), logits_to_keep=1)
        except (AttributeError, TypeError) as error:  # a layer was taken for a tensor
            raise UnsupportedModelError(
                f"{type(model).__name__} does more with keys and values than attend to them, so its cache cannot be compressed "
                f"({error})"
            ) from error
        for i in spec.shape.compressible:
            layer, heads = self.context(i), spec.shape.layers[i].kv_heads
            if layer.keys is None:
                raise UnsupportedModelError(f"layer {i} of {type(model).__name__} keeps no keys and values in its cache")
            if not layer.keys.shape == layer.values.shape == (heads, self.length, spec.shape.layers[i].head_dim):
                raise UnsupportedModelError(
                    f"layer {i} of {type(model).__name__} has keys {list(layer.keys.shape)} and values "
                    f"{list(layer.values.shape)}, but its config tells of {heads} KV heads with "
                    f"{spec.shape.layers[i].head_dim} channels"
                )
            if not (torch.isfinite(layer.keys).all() and torch.isfinite(layer.values).all()):
                raise CalibrationError(f"keys or values of layer {i} are not finite on a {example.task} prompt")
        if isinstance(spec.scorer, RereadingScorer):
            self.rank_by(self.reread_scores(spec.scorer))
        else:
            self.ranks = {i: self._ranks(i) for i in spec.shape.compressible}
        # Only these positions of the follow-up go through the head of the model, which is large. A list, because accelerate would
        # move a tensor to the first device, and the head may lie on another.
        read, place = torch.cat([example.predicting, example.asked]).unique(return_inverse=True)
        self.read: list[int] = read.tolist()
        self.predicting, self.asked = place.split([len(example.predicting), len(example.asked)])  # among those read
        self.full_log_probs = self._logits([spec.full_plans])[0, self.predicting].log_softmax(-1)  # [Y, V], nats

    def context(self, layer: int) -> ContextLayer:
        found = self.layers[layer]
        assert isinstance(found, ContextLayer)
        return found

    def _ranks(self, layer: int) -> Tensor:
        """Place of every token in the scorer's order, from 0; -1 for tokens that every head keeps: int64 [H_kv, N]."""
        scores = self.context(layer).scores
        position = torch.arange(self.length, device=scores.device)
        compressible = (position >= self.first) & (position < self.first + self.tokens)
        return ranks(scores, compressible).where(compressible, -1)

    def rank_by(self, scores: Mapping[int, Tensor]) -> None:
        """From now on by other scores [H_kv, N] of each compressible layer than those of the spec's scorer."""
        for layer, found in scores.items():
            self.context(layer).scores = found
        self.ranks = {i: self._ranks(i) for i in self.spec.shape.compressible}

    def reread_scores(self, scorer: RereadingScorer) -> dict[int, Tensor]:
        """Scores [H_kv, N] of each compressible layer by a scorer for which the model reads the context twice."""
        held = []
        for layer in self.layers:
            one = copy.copy(layer) if layer.is_sliding else DynamicLayer()
            if isinstance(layer, ContextLayer):
                one.keys, one.values = layer.keys[None], layer.values[None]
            held.append(one)
        ids = self.example.prefill[None]
        found = reread_scores(self.model, scorer, ids, torch.ones_like(ids, dtype=torch.bool), held)
        return {layer: scores[0] for layer, scores in found.items()}

    @property
    def nbytes(self) -> int:
        """Bytes held for the context and the predictions."""
        held = [self.full_log_probs, *(x for layer in self.layers if layer.keys is not None for x in (layer.keys, layer.values))]
        return sum(x.numel() * x.element_size() for x in held)

    def measure(self, tried: Sequence[PlansToTry]) -> tuple[Tensor, Tensor]:
        """(KL(full || compressed) in bits per predicted token, accuracy), float64 [A] each, of the plans tried.

        Accuracy is the share of known answers whose first token is the most likely one; NaN if none is known.
        """
        full = self.full_log_probs
        probs = full.exp()
        kl_bits, accuracy = [], []
        for batch in self._batches(tried):
            logits = self._logits(batch)
            lost = full - logits[:, self.predicting].log_softmax(-1)  # [A, Y, V]
            kl_bits.append(lost.mul_(probs).sum(-1).clamp(min=0).double().mean(-1) / math.log(2))
            right = logits[:, self.asked].argmax(-1) == self.example.answers  # [A, answers]
            accuracy.append(right.double().mean(-1))
        return torch.cat(kl_bits), torch.cat(accuracy)

    @torch.no_grad()
    def _logits(self, tried: Sequence[PlansToTry]) -> Tensor:
        """Logits fp32 [A, read positions, V] of the follow-up."""
        layers = decoder_layers(self.model, len(self.layers))
        if layers is None:
            rows = [[plans[i] for plans in tried] for i in range(len(self.layers))]
            return self._read_followup(rows, len(tried))
        batch = growth(tried, len(self.layers))
        with growing(layers, batch.parents):
            logits = self._read_followup(batch.rows, 1)
        return logits if batch.last == list(range(len(logits))) else logits[batch.last]

    def _read_followup(self, rows: Sequence[Sequence[LayerPlans]], width: int) -> Tensor:
        """Logits of the follow-up, fp32 [rows of the last layer, read positions, V]; the first layer reads `width` rows."""
        cache = cache_argument(self.model, Cache(layers=self.followup_layers(rows)))
        with borrowed(self.model):
            return self.model(self.example.followup.expand(width, -1), **cache, logits_to_keep=self.read).logits.float()

    def _batches(self, tried: Sequence[PlansToTry]) -> list[Sequence[PlansToTry]]:
        largest = max(layer.kv_heads * layer.head_dim for layer in self.spec.shape.layers)
        by_keys = BATCH_ELEMENTS // (largest * (self.length + len(self.example.followup)))
        by_logits = LOGIT_ELEMENTS // self.full_log_probs.shape[-1] // len(self.read)
        size = max(1, min(by_keys, by_logits))
        return [tried[i : i + size] for i in range(0, len(tried), size)]

    def followup_layers(
        self, rows: Sequence[Sequence[LayerPlans]], probes: dict[int, Tensor] | None = None
    ) -> list[CacheLayerMixin]:
        """Cache layers for a follow-up whose rows are given this in each layer, as one batch."""
        layers: list[CacheLayerMixin] = []
        for i, layer in enumerate(self.layers):
            if isinstance(layer, DynamicSlidingWindowLayer):
                layers.append(_repeated(layer, len(rows[i])))
            else:
                parts = self._parts(i, rows[i])
                layers.append(ReplayLayer(parts, self.length, None if probes is None else probes[i]))
        return layers

    def _parts(self, layer: int, rows: Sequence[LayerPlans]) -> list[ContextPart]:
        """One layer's context for each row. What several rows give a head is compressed once."""
        heads = len(self.ranks[layer])
        pairs: dict[tuple[int, HeadPlan | None], list[int]] = {}
        for a, row in enumerate(rows):
            for h, plan in enumerate(row or (None,) * heads):
                pairs.setdefault((h, plan), []).append(a * heads + h)
        versions = sorted(pairs, key=lambda version: len(pairs[version]))
        keys, values, kept = self._compressed(layer, versions)
        parts, begin = [], 0
        for _, alike in groupby(versions, key=lambda version: len(pairs[version])):
            users = torch.tensor([pairs[version] for version in alike], device=keys.device)  # [W, n]
            end = begin + len(users)
            parts.append(ContextPart(keys[begin:end], values[begin:end], kept[begin:end], users))
            begin = end
        return parts

    def _compressed(self, layer: int, versions: Sequence[tuple[int, HeadPlan | None]]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values [V, N, D] and kept [V, N] of heads of one layer under their plans."""
        context = self.context(layer)
        keys, values = (self._of_heads(layer, side, versions) for side in SIDES)
        head = torch.tensor([h for h, _ in versions], device=keys.device)
        ranks = self.ranks[layer][head]  # [V, N]
        key_runs, value_runs = _Runs(), _Runs()
        kept_counts = [self.tokens] * len(versions)
        for v, (_, plan) in enumerate(versions):
            if plan is None:
                continue
            edges = plan.edges(self.tokens)
            for tier, begin, end in zip(plan.tiers, edges, edges[1:]):
                key_runs.add((plan.format, tier.key_bits), (v, begin, end))
                value_runs.add((plan.format, tier.value_bits), (v, begin, end))
            kept_counts[v] = edges[-1]
        bases = self.spec.layer_bases(layer, [plan for _, plan in versions])
        key_runs.write(context.keys, head, ranks, keys, "keys", self.dtype, bases)
        value_runs.write(context.values, head, ranks, values, "values", self.dtype)
        return keys, values, ranks < torch.tensor(kept_counts, device=keys.device)[:, None]

    def _of_heads(self, layer: int, side: SideName, versions: Sequence[tuple[int, HeadPlan | None]]) -> Tensor:
        """Keys or values of each version's head: fp32 [V, N, D], as recent tokens are kept if the head has a plan."""
        exact, kept = getattr(self.context(layer), side).float(), self.with_windows(layer, side)
        return torch.stack([exact[h] if plan is None else kept[h] for h, plan in versions])

    def with_windows(self, layer: int, side: SideName) -> Tensor:
        """Keys or values fp32 [H_kv, N, D], the quantized window as heads with a plan keep it, all others at 16 bits."""
        x: Tensor = getattr(self.context(layer), side)
        kept = x.to(self.dtype).float()
        begin, end = self.first + self.tokens, self.first + self.spec.recent.past_window(self.length)
        if begin < end:
            (fmt, *bits), rows = QUANTIZED_FORM, x[:, begin:end].flatten(0, 1)
            lengths = torch.full((len(x),), end - begin, device=x.device)
            kept[:, begin:end] = roundtrip(fmt, side, rows, lengths, bits[SIDES.index(side)], self.dtype).view_as(
                kept[:, begin:end]
            )
        return kept


class _Runs:
    """Runs of tokens to be compressed, those of one format and precision together: few large operations, not many small."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int], list[tuple[int, int, int]]] = {}

    def add(self, stored: tuple[str, int], run: tuple[int, int, int]) -> None:
        """A run (version, begin, end): the tokens that the version ranks from `begin` to before `end`."""
        self.found.setdefault(stored, []).append(run)

    def write(
        self,
        context: Tensor,
        head: Tensor,
        ranks: Tensor,
        out: Tensor,
        side: SideName,
        dtype: torch.dtype,
        bases: Bases | None = None,
    ) -> None:
        """Context [H_kv, N, D], after compression, into out [V, N, D], version v from head[v] with tokens ranked ranks[v]."""
        for (fmt, bits), runs in self.found.items():
            version, begin, end = torch.tensor(runs, device=out.device).T
            ranked = ranks[version]  # [runs, N]
            run, token = ((ranked >= begin[:, None]) & (ranked < end[:, None])).nonzero(as_tuple=True)  # in order of position
            of_runs = bases.to(out.device).of(head[version]) if bases is not None and in_bases(fmt, side, bits) else None
            version = version[run]
            out[version, token] = roundtrip(fmt, side, context[head[version], token], end - begin, bits, dtype, of_runs)


def _repeated(layer: DynamicSlidingWindowLayer, batch: int) -> DynamicSlidingWindowLayer:
    """A copy of a sliding-window layer's state for a batch; its tensors are replaced, never written."""
    repeated = copy.copy(layer)
    repeated.keys, repeated.values = layer.keys.repeat(batch, 1, 1, 1), layer.values.repeat(batch, 1, 1, 1)
    return repeated
