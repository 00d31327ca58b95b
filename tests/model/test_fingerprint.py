"""What tells one model from another, and what does not."""

import copy

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from transformers import LlamaConfig

from ib_analysis.cache.attention import use_attention
from ib_analysis.model.fingerprint import model_fingerprint, weights_digest

SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("other", [{"num_hidden_layers": 3}, {"num_key_value_heads": 2}, {"rms_norm_eps": 1e-3}], ids=str)
def test_another_shape_is_another_model(other):
    assert model_fingerprint(LlamaConfig(**SIZE)) != model_fingerprint(LlamaConfig(**(SIZE | other)))


@pytest.mark.parametrize(
    "other",
    [{"name_or_path": "elsewhere"}, {"pad_token_id": 5}, {"use_cache": False}, {"dtype": "bfloat16"}, {"num_labels": 7}],
    ids=str,
)
def test_what_computes_the_same_is_the_same_model(other):
    assert model_fingerprint(LlamaConfig(**SIZE)) == model_fingerprint(LlamaConfig(**SIZE, **other))


def test_the_attention_function_does_not_count(small_llama):
    before = model_fingerprint(small_llama.config)
    use_attention(small_llama)
    assert model_fingerprint(small_llama.config) == before


@torch.no_grad()
def test_a_model_that_was_trained_further_is_another(small_llama):
    before, trained = weights_digest(small_llama), copy.deepcopy(small_llama)
    assert weights_digest(trained) == before
    trained.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert weights_digest(trained) != before and weights_digest(small_llama) == before


@torch.no_grad()
def test_quantized_weights_are_told_apart_by_all_that_they_consist_of(small_llama):
    """Codes and scales, as torchao has them: such a weight cannot be read as a plain tensor."""

    def digest(scale):
        model = copy.deepcopy(small_llama)
        layer = model.model.layers[1].mlp.up_proj
        layer.weight = torch.nn.Parameter(TwoTensor(layer.weight.data, scale * layer.weight.data), requires_grad=False)
        return weights_digest(model)

    assert digest(1) == digest(1) != digest(2)
