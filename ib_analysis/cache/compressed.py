"""A transformers cache that keeps, in each layer and KV head, what its plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ib_analysis.cache.attention import use_attention
from ib_analysis.cache.layer import CompressedLayer
from ib_analysis.cache.leading_layers import LeadingLayers, empty
from ib_analysis.cache.lost_cache import warn_if_lost
from ib_analysis.cache.masks import MaskCheck
from ib_analysis.cache.numbers import check_range
from ib_analysis.cache.plan import Plans
from ib_analysis.cache.rereading import checked_padding, read, reread_scores
from ib_analysis.cache.saved_cache import fill_layers, plans_of, read_cache, write_cache
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.errors import ProfileMismatchError, UnsupportedModelError
from ib_analysis.model.devices import input_device
from ib_analysis.scorers import RereadingScorer, scorer_name


class CompressedCache(Cache):
    """Build it with `allocation.cache(model)`; `model.generate(**inputs, **cache_argument(model, cache))` fills it.

    `plans` has a row of head plans for each layer, None for one that stays at full precision, as sliding-window layers
    do. The model must use the attention function of `ib_analysis.cache.attention.use_attention`, which serves other caches, too.
    Padding, on the left, is never stored, but counts when tokens leave the window: a padded sequence may keep up to
    `recent.flush` - 1 tokens more or fewer at 16 bits than it would alone.
    """

    def __init__(self, spec: CacheSpec, plans: Plans) -> None:
        self.spec, self.plans = spec, plans
        layers: list[CacheLayerMixin] = []
        masks = MaskCheck()
        for i, (layer, heads) in enumerate(zip(spec.shape.layers, plans, strict=True)):
            if layer.sliding_window is not None:
                layers.append(DynamicSlidingWindowLayer(sliding_window=layer.sliding_window))
            elif heads is None:
                layers.append(DynamicLayer())
            else:
                layers.append(CompressedLayer(i, heads, spec.recent, spec.scorer, masks, spec.layer_bases(i, heads)))
        super().__init__(layers=layers)
        first = next((i for i, layer in enumerate(layers) if isinstance(layer, CompressedLayer)), 0)
        self.leading = LeadingLayers(layers[:first])
        if first > 0:
            layers[first].leading = self.leading

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """See transformers. Raises ValueError if the last step ended before all layers had its tokens."""
        if layer_idx == 0 and self.is_broken:
            raise ValueError(
                "the last step on this cache was interrupted or refused in the middle, so its layers hold different tokens: "
                "call reset() and fill it again, or use a new cache"
            )
        if layer_idx == 0 and self._rereads is not None and self.get_seq_length() == 0:
            raise ValueError(
                f"for scorer {scorer_name(self.spec.scorer)!r} the model reads the context twice: call "
                "cache.fill(model, input_ids[:, :-1]), then generate with all of input_ids"
            )
        if layer_idx == 0 and self._batch not in (None, len(key_states)):
            raise ValueError(
                f"the cache holds {self._batch} sequences, not {len(key_states)}: use a cache for each batch, or "
                "batch_repeat_interleave"
            )
        if layer_idx < len(self.leading.layers):
            self.leading.remember(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def _batch(self) -> int | None:
        """How many sequences it holds; None if it is empty."""
        return next((len(layer.keys) for layer in self.layers if layer.keys is not None and layer.get_seq_length() > 0), None)

    @property
    def _rereads(self) -> RereadingScorer | None:
        """The scorer, if something is compressed and it needs the context to be read twice."""
        compresses = any(isinstance(layer, CompressedLayer) for layer in self.layers)
        return self.spec.scorer if compresses and isinstance(self.spec.scorer, RereadingScorer) else None

    @torch.inference_mode(False)  # where the caller has it on, nothing could be differentiated
    @torch.no_grad()
    def fill(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Reads a context, and compresses it: `generate` with these tokens and more goes on from there.

        input_ids int64 [B, T]; attention_mask [B, T], 0 at padding, which is on the left. With most scorers a forward pass does
        the same. Those for which the model reads the context twice need this, and hold all keys and values at full precision
        until they are ranked. If it fails, the cache is empty. Raises ValueError if it holds tokens already, and for other masks.
        """
        if self.get_seq_length() > 0:
            raise ValueError(f"the cache holds {self.get_seq_length()} tokens already: call reset(), or use a new cache")
        ids, valid = input_ids.clone(), checked_padding(input_ids, attention_mask)
        try:
            if self._rereads is None:
                read(model, ids, valid, self)
            else:
                self._fill_twice(model, ids, valid, self._rereads)
        except BaseException:
            self.reset()
            raise

    def _fill_twice(self, model: PreTrainedModel, ids: Tensor, valid: Tensor, scorer: RereadingScorer) -> None:
        """Layers that are not compressed are filled by the first reading itself."""
        layers = [DynamicLayer() if isinstance(layer, CompressedLayer) else layer for layer in self.layers]
        read(model, ids, valid, Cache(layers=layers))
        scores = reread_scores(model, scorer, ids, valid, layers)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, CompressedLayer):
                keys, values = layers[i].keys, layers[i].values
                assert keys is not None and values is not None
                check_range(i, keys, values)
                layer.fill(keys, values, valid.to(keys.device), scores[i])
                layers[i].keys = layers[i].values = None

    def check_used(self, tokens: int = 1) -> None:
        """Raises UnsupportedModelError unless a model has read so many tokens with this cache.

        After `out = model.generate(...)` they are `out.shape[1] - 1`: the last is not read. Some models replace the cache that
        they are given, and answer from a full one.
        """
        if self.get_seq_length() < tokens:
            raise UnsupportedModelError(
                f"the model did not use the cache that it was given: this holds {self.get_seq_length()} of {tokens} tokens, so "
                "the model made one of its own (as long-context variants of Phi-3 do at their original length): pass a prompt "
                "that stays on one side of that length, and use_cache=True"
            )

    @property
    def is_broken(self) -> bool:
        """Whether a step has ended before all layers had its tokens."""
        changing = any(isinstance(layer, CompressedLayer) and layer.changing for layer in self.layers)
        return changing or len({layer.get_seq_length() for layer in self.layers}) > 1

    def save(self, path: str | Path, model: PreTrainedModel) -> None:
        """Writes a safetensors file with all that the cache holds, as large as it is, and with its plans.

        `load` gives it back, in another process too, and it answers as this one would, to the bit. Raises ValueError if a step on
        the cache was interrupted, ProfileMismatchError for a model of another shape, UnknownNameError for a scorer that is in no
        registry.
        """
        if self.is_broken:
            raise ValueError("the last step on this cache was interrupted or refused: call reset() and fill it again")
        write_cache(Path(path), self.spec, self.plans, self.layers, model)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> CompressedCache:
        """Reads what `save` wrote, onto the model's device, and switches the model to our attention function.

        Raises CorruptFileError if the file was cut or edited, ProfileMismatchError if another model filled the cache, or the same
        in another dtype, for a model that is spread over devices, and for another version or contents; FileNotFoundError.
        """
        tensors, header = read_cache(Path(path), model)
        try:
            cache = cls(*plans_of(tensors, header))
            fill_layers(cache.layers, tensors, header["layers"], input_device(model))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ProfileMismatchError(f"{path} has other contents than a cache ({error!r}): fill it again") from error
        use_attention(model)
        warn_if_lost(model)
        return cache

    def reset(self) -> None:
        """Forgets all tokens."""
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.reset()
            else:
                empty(layer)

    def activate_past_recording(self) -> None:
        """Raises ValueError: assisted generation, which asks for this, takes back tokens that may be compressed by then."""
        raise ValueError("assisted generation needs a cache that can be cropped, and compressed tokens cannot be taken back")

    def crop(self, tokens_to_remove: int) -> None:
        """See transformers. All layers are asked before one changes; raises ValueError if one of them cannot do it."""
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.check_crop(tokens_to_remove)
            elif isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() >= layer.sliding_window:
                raise ValueError("cannot crop: the tokens before the sliding window of a layer are gone; fill the cache again")
        super().crop(tokens_to_remove)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that the cache holds; not of what a decode step works with, whose size is fixed, nor of the bases
        of keys, which belong to the model (`spec.bases.nbytes`)."""
        return sum(_layer_nbytes(layer) for layer in self.layers)

    @property
    def sliding_nbytes(self) -> int:
        """Of these, the bytes of sliding-window layers, which are never compressed."""
        return sum(_layer_nbytes(layer) for layer in self.layers if layer.is_sliding)


def _layer_nbytes(layer: CacheLayerMixin) -> int:
    tensors = layer.tensors() if isinstance(layer, CompressedLayer) else [layer.keys, layer.values]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
