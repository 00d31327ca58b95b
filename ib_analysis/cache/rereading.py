"""A model reads its context a second time, for scorers that rank tokens by it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from ib_analysis.cache.attention import AnsweringLayer, borrowed, cache_argument, causal_mask, full_attention
from ib_analysis.errors import UnsupportedModelError
from ib_analysis.model.decoder import decoder_layers
from ib_analysis.scorers.repetition import Repetition, RereadingScorer

SINKS = 4  # the context's first tokens, which share the attention to a later chunk
CUE = 8  # tokens before a later chunk that are read with it, so that the model knows where it is


class RereadLayer(CacheLayerMixin, AnsweringLayer):
    """Answers from a context's keys and values [1, H_kv, T, D], and keeps what it is asked."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, differentiates: bool) -> None:
        super().__init__()
        self.context, self.differentiates = (keys, values), differentiates
        self.hook: RemovableHandle | None = None  # which adds the probe
        self.probe: Tensor | None = None  # [1, M, hidden], zeros whose gradient is that of the layer's output
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.new = key_states, value_states
        return self, self

    def attend(self, module: nn.Module, query: Tensor, mask: Tensor | None, scaling: float, extras: dict[str, Any]) -> Tensor:
        keys, values = (torch.cat([old, new], 2) for old, new in zip(self.context, self.new))
        visible = causal_mask(query.shape[2], keys.shape[2], keys.device)
        out = full_attention(module, query, keys, values, visible, scaling, extras)
        self.module, self.query, self.new_keys, self.scaling = module, query.detach()[0], self.new[0].detach()[0], scaling
        del self.new
        if self.differentiates:
            self._probe_output(module)
        return out

    def _probe_output(self, module: nn.Module) -> None:
        """Adds the probe to what the layer is about to project its output to."""
        projection, thread = getattr(module, "o_proj", None), get_ident()
        if projection is None:
            raise UnsupportedModelError(f"{type(module).__name__} has no o_proj to differentiate: use another scorer")

        def add(module: nn.Module, given: Any, out: Tensor) -> Tensor | None:
            if get_ident() != thread:  # threads share the model
                return None
            self.probe = torch.zeros_like(out, requires_grad=True)
            return out + self.probe

        self.hook = projection.register_forward_hook(add)

    def repetition(self, chunk: slice, gradient: Tensor | None) -> Repetition:
        """Of the tokens of the context in `chunk`; the gradient [1, M, hidden] is the probe's."""
        keys, values = self.context[0][0], self.context[1][0, :, chunk]
        read = torch.cat([keys[:, : min(SINKS, chunk.start)], keys[:, chunk], self.new_keys], 1)
        of_sequence = None if gradient is None else gradient[0]
        return Repetition(self.module, self.query, read, values, self.scaling, of_sequence)

    def get_seq_length(self) -> int:
        return self.context[0].shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def checked_padding(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which of the ids [B, T] are tokens: bool [B, T]. Raises ValueError unless those of each sequence are at its end."""
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids are [sequences, tokens] and not empty, not {list(input_ids.shape)}")
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"the mask has shape {list(attention_mask.shape)}, input_ids have {list(input_ids.shape)}")
    valid = attention_mask.bool().clone()
    wrong = ~valid[:, -1] | (valid[:, :-1] & ~valid[:, 1:]).any(1)
    if bool(wrong.any()):
        raise ValueError(f"sequence {int(wrong.nonzero()[0])} has padding that is not on its left: set tokenizer.padding_side")
    return valid


def read(model: PreTrainedModel, ids: Tensor, valid: Tensor, cache: Cache) -> None:
    """Reads ids [B, T] into an empty cache; `valid` bool [B, T] is false at padding, on the left."""
    padded = {}
    if not bool(valid.all()):
        padded = {"attention_mask": valid.long(), "position_ids": (valid.long().cumsum(1) - 1).clamp(min=0)}
    model(ids, **padded, **cache_argument(model, cache), logits_to_keep=1)


@torch.no_grad()
def reread_scores(
    model: PreTrainedModel, scorer: RereadingScorer, ids: Tensor, valid: Tensor, layers: Sequence[CacheLayerMixin]
) -> dict[int, Tensor]:
    """Scores fp32 [B, H_kv, T] of contexts, by each layer without a sliding window; 0 at padding.

    The layers hold the keys and values [B, H_kv, T, D] of ids [B, T], and are left as they are; `valid` as in `read`. Each
    sequence is read again alone. Raises UnsupportedModelError if a gradient is needed that the model does not give.
    """
    found: dict[int, Tensor] = {}
    for b, first in enumerate((~valid).sum(1).tolist()):
        of_sequence = _reread(model, scorer, ids[b, first:], [_alone(layer, b, first, ids.shape[1]) for layer in layers])
        for i, scores in of_sequence.items():
            found.setdefault(i, scores.new_zeros(len(ids), len(scores), ids.shape[1]))[b, :, first:] = scores
    return found


def _reread(
    model: PreTrainedModel, scorer: RereadingScorer, tokens: Tensor, layers: Sequence[CacheLayerMixin]
) -> dict[int, Tensor]:
    """Scores [H_kv, T] of one sequence, tokens [T]."""
    length = len(tokens)
    found: dict[int, list[Tensor]] = {i: [] for i, layer in enumerate(layers) if not layer.is_sliding}
    for begin in range(0, length, scorer.chunk):
        chunk = slice(begin, min(length, begin + scorer.chunk))
        reading = [_reading(layer, scorer.differentiates) for layer in layers]
        gradients = _read_again(model, tokens[max(0, begin - CUE) : chunk.stop], reading, scorer.differentiates)
        for i, layer in enumerate(reading):
            if isinstance(layer, RereadLayer):
                found[i].append(scorer.reread(layer.repetition(chunk, gradients.get(i))))
    return {i: torch.cat(scores, 1) for i, scores in found.items()}


def _reading(layer: CacheLayerMixin, differentiates: bool) -> CacheLayerMixin:
    """A layer to read a chunk with. One with a sliding window gets a copy, whose tensors are replaced, never written."""
    assert layer.keys is not None and layer.values is not None
    return copy.copy(layer) if layer.is_sliding else RereadLayer(layer.keys, layer.values, differentiates)


def _read_again(
    model: PreTrainedModel, tokens: Tensor, reading: Sequence[CacheLayerMixin], differentiates: bool
) -> dict[int, Tensor]:
    """Reads tokens [M] behind the context; if asked for, the gradients [1, M, hidden] of each layer's probe."""
    cache = cache_argument(model, Cache(layers=list(reading)))
    if not differentiates:
        with borrowed(model):
            model(tokens[None], **cache, logits_to_keep=1)
        return {}
    states: list[Tensor] = []
    decoder = decoder_layers(model, len(reading))
    if decoder is None:
        raise UnsupportedModelError(f"the layers of {type(model).__name__} are not found: use a scorer without gradients")
    thread = get_ident()

    def keep(module: nn.Module, given: Any, out: Any) -> None:
        if get_ident() == thread:  # threads share the model
            states.append(out[0] if isinstance(out, tuple) else out)

    hook = decoder[-1].register_forward_hook(keep)
    try:
        with torch.enable_grad(), borrowed(model):
            model(tokens[None], **cache, logits_to_keep=1)
            layers = {i: layer for i, layer in enumerate(reading) if isinstance(layer, RereadLayer)}
            probes = {i: layer.probe for i, layer in layers.items() if layer.probe is not None}
            gradients = torch.autograd.grad(states[0].float().square().sum(), list(probes.values()), allow_unused=True)
    finally:
        for added in (hook, *(layer.hook for layer in reading if isinstance(layer, RereadLayer))):
            if added is not None:
                added.remove()
    if any(gradient is None for gradient in gradients):
        raise UnsupportedModelError(f"layers of this {type(model).__name__} pass no gradients on: use a scorer without them")
    return dict(zip(probes, gradients))


def _alone(layer: CacheLayerMixin, sequence: int, first: int, length: int) -> CacheLayerMixin:
    """What a layer of a batch, which has read `length` positions, holds of one sequence, whose first token is at `first`."""
    assert layer.keys is not None and layer.values is not None
    one = copy.copy(layer)
    begin = max(0, first - (length - layer.keys.shape[2]))  # a sliding window has forgotten some positions
    one.keys, one.values = (x[sequence : sequence + 1, :, begin:] for x in (layer.keys, layer.values))
    if isinstance(one, DynamicSlidingWindowLayer):
        one.cumulative_length = length - first
    return one
