"""The seam into transformers: what it computes, and that a model which lends itself is given back as it was."""

import inspect
from contextlib import nullcontext, suppress
from functools import partial
from typing import ClassVar

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from ib_analysis.cache.attention import (
    NAME,
    borrowed,
    cache_argument,
    causal_mask,
    full_attention,
    use_attention,
)
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.plan import RAW, Recent
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.errors import UnsupportedModelError
from ib_analysis.model.shape import cache_shape
from ib_analysis.scorers import SCORERS

OWN = ("eager", "sdpa")
ENDINGS = (None, ValueError, KeyboardInterrupt)
SIZE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama(implementation, config=None):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZE, **HEADS, initializer_range=0.5) if config is None else config
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


def image_model(implementation):
    """A model of two models, each with a config within its own."""
    vision = {**SIZE, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    del vision["vocab_size"]
    config = AutoConfig.for_model("gemma3", text_config={**SIZE, **HEADS, "head_dim": 16}, vision_config=vision)
    return AutoModelForImageTextToText.from_config(config, attn_implementation=implementation).eval()


class Part(PreTrainedConfig):
    model_type = "part"


class LlamaWithPart(LlamaConfig):
    """A config within which there is another, of no model."""

    sub_configs: ClassVar = {"part": Part}


class LlamaWithParts(LlamaConfig):
    sub_configs: ClassVar = {"inner": LlamaWithPart}


def nested(outer, inner, innermost):
    """A model whose config has two more within it, one in the other."""
    config = LlamaWithParts(**SIZE, **HEADS)
    config.inner = LlamaWithPart(**SIZE, **HEADS)
    config.inner.part = Part()
    model = llama(outer, config)
    model.config.inner._attn_implementation = {"": inner, "part": innermost}
    return model


def implementations(config):
    """The attention function of a config and of all within it."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    return config._attn_implementation, {name: implementations(part) for name, part in parts.items() if part is not None}


def ids():
    return torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


MODELS = {
    **{name: partial(llama, name) for name in OWN},
    **{f"image, {name}": partial(image_model, name) for name in OWN},
    "image, text eager": partial(image_model, {"text_config": "eager", "vision_config": "sdpa"}),
    "image, top eager": partial(image_model, {"": "eager", "text_config": "sdpa", "vision_config": "eager"}),
    "nested, alike": partial(nested, "sdpa", "sdpa", "sdpa"),
    "nested, mixed": partial(nested, "sdpa", "eager", "sdpa"),
    "nested, none": partial(nested, "eager", "sdpa", None),
}


@pytest.mark.parametrize("ending", ENDINGS, ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_borrowed_model_is_given_back_as_it_was(make, ending):
    model = make()
    before = implementations(model.config)
    with nullcontext() if ending is None else pytest.raises(ending), borrowed(model):
        assert model.config._attn_implementation == NAME
        assert model.config.get_text_config(decoder=True)._attn_implementation == NAME
        if ending is not None:
            raise ending
    assert implementations(model.config) == before


@pytest.mark.parametrize("ending", ENDINGS, ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_borrowed_twice_it_is_ours_until_the_outer_end(make, ending):
    model = make()
    before = implementations(model.config)
    with borrowed(model):
        ours = implementations(model.config)
        with suppress(ValueError, KeyboardInterrupt), borrowed(model):
            assert implementations(model.config) == ours
            if ending is not None:
                raise ending
        assert implementations(model.config) == ours
    assert implementations(model.config) == before


@torch.no_grad()
@pytest.mark.parametrize("implementation", OWN)
def test_it_computes_the_same_before_inside_and_after(implementation):
    model = llama(implementation)
    before = model(ids()).logits
    with borrowed(model):
        inside = model(ids()).logits
    torch.testing.assert_close(inside, before, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(ids()).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("ending", ENDINGS, ids=str)
def test_an_eager_model_returns_its_attention_weights_afterwards(ending):
    model = llama("eager")
    before = model(ids(), output_attentions=True).attentions
    with suppress(ValueError, KeyboardInterrupt), borrowed(model):
        model(ids())
        if ending is not None:
            raise ending
    after = model(ids(), output_attentions=True).attentions
    assert len(after) == len(before) == 2
    for found, expected in zip(after, before):
        assert found.shape == (2, 4, 12, 12) and torch.equal(found, expected)


def test_a_model_that_was_switched_for_good_stays_so():
    model = llama("sdpa")
    use_attention(model)
    with borrowed(model):
        pass
    assert model.config._attn_implementation == NAME


def test_a_text_model_that_was_switched_back_is_switched_again():
    model = image_model("sdpa")
    use_attention(model)
    model.set_attn_implementation({"text_config": "sdpa"})
    use_attention(model)
    assert model.config.text_config._attn_implementation == NAME


def test_a_model_with_an_attention_of_its_own_is_refused_and_left_as_it_was():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    before = implementations(model.config)
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM does not take its attention function"), borrowed(model):
        pytest.fail("borrowed")
    assert implementations(model.config) == before


def filled_cache():
    """(llama, a compressed cache that holds 12 tokens of two sequences)."""
    model = llama("sdpa")
    spec = CacheSpec(cache_shape(model.config), Recent(2, 4, 4), SCORERS["value_aware"])
    use_attention(model)
    cache = CompressedCache(spec, spec.uniform(RAW))
    model(ids(), **cache_argument(model, cache))
    return model, cache


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_with_another_attention_function_is_told(implementation):
    model, cache = filled_cache()
    model.set_attn_implementation(implementation)
    with pytest.raises(UnsupportedModelError, match=r"call allocation\.cache\(model\)"):
        model(ids()[:, :3], **cache_argument(model, cache))


@torch.no_grad()
def test_the_cache_is_passed_by_the_name_that_the_model_has_for_it():
    model = llama("sdpa")
    cache = DynamicCache(config=model.config)
    model(ids(), **cache_argument(model, cache))
    assert cache.get_seq_length() == 12
    name = next(name for name in ("cache", "past_key_values") if name in inspect.signature(model.forward).parameters)
    assert cache_argument(model, cache) == {name: cache, "use_cache": True}


def written_out(query, keys, values, mask, scaling, softcap=None, sinks=None):
    """Attention in float64, one query head and one position at a time."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    grouped = query.shape[1] // keys.shape[1]
    for b, h, m in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        k, v = keys[b, h // grouped].double(), values[b, h // grouped].double()
        logits = k @ query[b, h, m].double() * scaling
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~mask[b if len(mask) > 1 else 0, 0, m], -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[h].double()[None]])
        out[b, h, m] = logits.softmax(-1)[: len(v)] @ v
    return out


@pytest.mark.parametrize("extras", [{}, {"softcap": 2.0}, {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_full_attention_is_its_definition(extras, padded):
    module = torch.nn.Module()
    vars(module).update(num_key_value_groups=2, is_causal=True)
    query, (keys, values) = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 2, 5, 8)
    mask = causal_mask(5, 5, query.device)
    assert torch.equal(mask[0, 0], torch.ones(5, 5, dtype=torch.bool).tril())
    if padded:
        mask = mask.repeat(2, 1, 1, 1)
        mask[1, :, :, :2] = False
    found = full_attention(module, query, keys, values, mask if padded else None, 0.4, extras)
    expected = written_out(query, keys, values, mask, 0.4, extras.get("softcap"), extras.get("s_aux"))
    seen = mask.any(-1).expand(2, 4, 5)  # what padding sees, nobody reads
    torch.testing.assert_close(found[seen].double(), expected[seen], atol=1e-5, rtol=1e-4)


def test_the_newest_positions_see_all_before_them():
    assert causal_mask(2, 4, torch.device("cpu"))[0, 0].tolist() == [[True, True, True, False], [True] * 4]
