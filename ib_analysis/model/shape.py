"""The shape of a model's KV cache, read from its config."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from transformers import PreTrainedConfig

from ib_analysis.errors import UnsupportedModelError

MAX_SIZE = 2**14  # KV heads or channels that a layer may have; more is a damaged file
ELEMENT_BYTES = 2  # of the full 16-bit cache, and of tokens that are never compressed


@dataclass(frozen=True)
class LayerShape:
    """One attention layer's cache. `sliding_window`, in tokens, if it has one: such a layer is never compressed."""

    kv_heads: int
    head_dim: int
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(size, int) and 0 < size <= MAX_SIZE for size in (self.kv_heads, self.head_dim)):
            raise ValueError(f"no layer has {self.kv_heads!r} KV heads of {self.head_dim!r} channels")

    @property
    def bytes_per_token(self) -> int:
        return 2 * ELEMENT_BYTES * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class CacheShape:
    """All layers of a model's cache, in order."""

    layers: tuple[LayerShape, ...]

    @property
    def compressible(self) -> list[int]:
        """Indices of the layers that can be compressed."""
        return [i for i, layer in enumerate(self.layers) if layer.sliding_window is None]

    @property
    def heads(self) -> list[tuple[int, int]]:
        """(layer, KV head) of every head that can be compressed."""
        return [(i, h) for i in self.compressible for h in range(self.layers[i].kv_heads)]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in the compressible layers of the full 16-bit cache."""
        return sum(self.layers[i].bytes_per_token for i in self.compressible)


def cache_shape(config: PreTrainedConfig) -> CacheShape:
    """Shape of the cache of a decoder with this config.

    Raises UnsupportedModelError, naming the layer and why, for latent attention, linear attention and the like, if
    every layer has a sliding window, if layers differ in their heads, and if keys differ from values in their channels.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(f"layer 0 of {text.model_type} caches latents (MLA), not keys and values of heads")
    heads = getattr(text, "num_attention_heads", None)
    if not heads or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{text.model_type} is no decoder-only model with attention heads in its config")
    try:
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    except RuntimeError as error:  # transformers refuses to name one value (Gemma 4)
        raise UnsupportedModelError(
            f"layers of {text.model_type} differ in head_dim or num_key_value_heads: only models whose layers are alike are "
            "supported"
        ) from error
    value_dim = getattr(text, "v_head_dim", None) or head_dim
    if value_dim != head_dim:
        raise UnsupportedModelError(
            f"{text.model_type} has keys of {head_dim} and values of {value_dim} channels: both must be alike"
        )
    windows = [_sliding_window(text, i) for i in range(text.num_hidden_layers)]
    if None not in windows:
        raise UnsupportedModelError(f"every layer of {text.model_type} has a sliding window: there is nothing to compress")
    return CacheShape(tuple(LayerShape(kv_heads, head_dim, window) for window in windows))


def _sliding_window(text: PreTrainedConfig, layer: int) -> int | None:
    """Tokens that the layer sees; None if it sees all, as it does with a window as long as the model's positions."""
    window = getattr(text, "sliding_window", None)
    if window is not None and window >= getattr(text, "max_position_embeddings", inf):
        window = None
    types = getattr(text, "layer_types", None)
    if types is None:
        return window
    if types[layer] == "full_attention":
        return None
    if types[layer] == "sliding_attention":
        return window
    raise UnsupportedModelError(
        f"layer {layer} of {text.model_type} is of type {types[layer]!r}: only full and sliding-window attention is supported"
    )
