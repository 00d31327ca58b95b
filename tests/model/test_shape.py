"""The cache's shape from a config; what cannot be compressed is refused by name."""

import pytest
from transformers import AutoConfig, T5Config

from ib_analysis.errors import UnsupportedModelError
from ib_analysis.model.shape import CacheShape, LayerShape, cache_shape


def test_grouped_heads_and_bytes():
    config = AutoConfig.for_model("llama", num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=16)
    assert cache_shape(config) == CacheShape((LayerShape(2, 16),) * 3)
    assert cache_shape(config).bytes_per_token == 3 * 2 * 2 * 16 * 2


def test_sliding_layers_are_told_apart():
    types = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=2, layer_types=types, sliding_window=8)
    shape = cache_shape(config)
    assert shape.compressible == [1]
    assert shape.layers[0].sliding_window == 8
    assert shape.bytes_per_token == shape.layers[1].bytes_per_token


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("deepseek_v3", "layer 0 .*MLA"),
        ("qwen3_next", "layer 0 .*linear_attention"),
        ("minimax", "layer 1 .*linear_attention"),
        ("mamba", "no decoder-only model"),
        ("falcon_h1", "layer 0 .*hybrid"),
        ("gemma4_text", "gemma4_text differ in head_dim"),
        ("mimo_v2_flash", "keys of 192 and values of 128 channels"),
    ],
)
def test_layers_that_cannot_be_compressed_are_named(name, said):
    with pytest.raises(UnsupportedModelError, match=said):
        cache_shape(AutoConfig.for_model(name))


@pytest.mark.parametrize("name", ["phi3", "mistral", "qwen3"])
def test_a_window_as_long_as_the_model_s_positions_hides_nothing(name):
    """As in Phi-3-mini-128k and Phi-4-mini."""
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    size |= {"pad_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 128}
    types = {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True} if name == "qwen3" else {}
    for window in (128, 262_144):
        shape = cache_shape(AutoConfig.for_model(name, **size, **types, sliding_window=window))
        assert shape.compressible == [0, 1]
    with pytest.raises(UnsupportedModelError, match="every layer"):
        cache_shape(AutoConfig.for_model(name, **size, **types, sliding_window=127))


def test_only_sliding_layers_and_encoders_are_refused():
    with pytest.raises(UnsupportedModelError, match="every layer"):
        cache_shape(AutoConfig.for_model("mistral", num_hidden_layers=2, sliding_window=16))
    with pytest.raises(UnsupportedModelError, match="decoder-only"):
        cache_shape(T5Config())


@pytest.mark.parametrize(("heads", "head_dim"), [(0, 8), (-1, 8), (10**12, 8), (2, 0), (2, 1.5), (2, "8"), (None, 8)])
def test_sizes_that_no_layer_has_are_refused(heads, head_dim):
    with pytest.raises(ValueError, match="no layer has"):
        LayerShape(heads, head_dim)
