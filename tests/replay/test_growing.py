"""Plans that agree so far are computed once, and each predicts what it predicts alone."""

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ib_analysis.cache.plan import EVICTED, HeadPlan, Recent, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.decoder import decoder_layers
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay import replay as ib_replay
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.growing import growing, growth
from ib_analysis.replay.replay import Replay
from ib_analysis.scorers import SCORERS

A, B = EVICTED, HeadPlan("kivi", (Tier(0.5, 4, 4),))
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TYPES = {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
CONFIGS: dict[Any, dict[str, Any]] = {
    LlamaConfig: {},
    MistralConfig: {"sliding_window": None},
    Qwen2Config: {},
    Qwen3Config: {},
    Phi3Config: {},
    Gemma2Config: TYPES,
    Gemma3TextConfig: TYPES,
    Olmo2Config: {},
    GraniteConfig: {},
    GptOssConfig: {**TYPES, **EXPERTS},
    MixtralConfig: EXPERTS,
    Qwen3MoeConfig: EXPERTS,
}


def test_rows_are_what_differs_so_far():
    x, y = (A, A), (B, A)
    batch = growth([(x, None, x), (x, None, y), (y, None, x), (x, None, x)], 3)
    assert batch.rows == [[x, y], [None, None], [x, y, x]]
    assert batch.parents == [[0, 0], [0, 1], [0, 0, 1]]
    assert batch.last == [0, 1, 2, 0]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_each_plan_predicts_what_it_predicts_alone(config, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES, **CONFIGS[config])).eval()
    spec = CacheSpec(cache_shape(model.config), Recent(1, 5, 1), SCORERS["value_aware"])
    example = make_examples(model, None, [torch.randint(1, 100, (60,))])[0]
    replay = Replay(model, spec, example)
    tried = [spec.full_plans, spec.null_plans, *(spec.single_head(head, plan) for head in spec.shape.heads for plan in (A, B))]
    widths = []
    hook = replay.model.get_decoder().norm.register_forward_pre_hook(lambda module, args: widths.append(len(args[0])))
    together, _ = replay.measure(tried)
    assert widths == [len(tried)]
    alone = torch.cat([replay.measure([plans])[0] for plans in tried])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-6)
    hook.remove()
    monkeypatch.setattr(ib_replay, "decoder_layers", lambda *arguments: None)
    torch.testing.assert_close(replay.measure(tried)[0], together, rtol=1e-3, atol=1e-6)


def test_a_layer_is_computed_for_what_differs_so_far(small_llama, small_prompts):
    spec = CacheSpec(cache_shape(small_llama.config), Recent(1, 5, 1), SCORERS["value_aware"])
    replay = Replay(small_llama, spec, make_examples(small_llama, None, small_prompts[:1])[0])
    widths = []
    for layer in small_llama.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: widths.append(len(args[0])))
    replay.measure([spec.single_head(head, plan) for head in spec.shape.heads for plan in (A, B)])
    assert widths == [5, 8]  # four differ in the first layer, the others are one row there


def test_layers_of_another_form_are_not_taken():
    class Other(nn.Module):
        def forward(self, x): ...

    class Model(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def get_decoder(self):
            return self

    assert decoder_layers(Model([Other(), Other()]), 2) is None
    assert decoder_layers(Model([Other(), Other()]), 3) is None


def test_hooks_are_removed(small_llama):
    layers = decoder_layers(small_llama, 2)
    assert layers is not None
    with suppress(KeyError), growing(layers, [[0, 0], [0, 1]]):
        assert len(layers[0]._forward_pre_hooks) == 1 and not layers[1]._forward_pre_hooks
        raise KeyError
    assert not layers[0]._forward_pre_hooks
