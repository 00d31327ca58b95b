"""The layers before the first compressed one: they take a step's tokens before it can refuse them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer


class LeadingLayers:
    """Layers at full precision, which can give back what they took last."""

    def __init__(self, layers: Sequence[CacheLayerMixin] = ()) -> None:
        self.layers = layers
        self._held: dict[int, Any] = {}  # before the step: a number of tokens, or what a sliding window had

    def remember(self, number: int) -> None:
        """Called before the layer of this number takes tokens."""
        layer = self.layers[number]
        self._held[number] = _window(layer) if isinstance(layer, DynamicSlidingWindowLayer) else layer.get_seq_length()

    @contextmanager
    def given_back_on_error(self) -> Iterator[None]:
        """An error within leaves the layers as they were before the step."""
        try:
            yield
        except BaseException:
            for number, held in self._held.items():
                _restore(self.layers[number], held)
            self.forget()
            raise

    def forget(self) -> None:
        """The step is taken; what windows had before it is not kept in memory."""
        self._held.clear()


def _window(layer: DynamicSlidingWindowLayer) -> tuple[Tensor | None, Tensor | None, int]:
    return layer.keys, layer.values, layer.cumulative_length


def _restore(layer: CacheLayerMixin, held: Any) -> None:
    tokens = held[2] if isinstance(held, tuple) else held
    if tokens == 0:
        empty(layer)
    elif isinstance(held, tuple):
        layer.keys, layer.values, layer.cumulative_length = held
    elif layer.keys is not None and layer.values is not None:
        # Copied: a view would keep the tokens in memory.
        layer.keys, layer.values = (x[:, :, :tokens].clone() for x in (layer.keys, layer.values))


def empty(layer: CacheLayerMixin) -> None:
    """Forgets all tokens of a layer at full precision; `reset` of older versions of transformers keeps them as zeros."""
    layer.keys = layer.values = None
    layer.is_initialized = False
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = 0
