"""A cache that a model is given and does not read: said before, where its code tells, and noticed after."""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, pipeline

from ib_analysis.cache.attention import cache_argument, use_attention
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.lost_cache import lost_at
from ib_analysis.cache.plan import RAW, HeadPlan, Tier
from ib_analysis.errors import UnsupportedModelError
from ib_analysis.model.load import load
from ib_analysis.scorers import SCORERS
from ib_analysis.search.optimize import full_allocation
from tests.cache.test_compressed import small_model, spec_of

SWITCH = 64  # tokens up to which the short factors hold
IDS = torch.randint(3, 99, (1, 100), generator=torch.Generator().manual_seed(0))


def long_rope_model(switch, vocabulary):
    """Its frequencies, and its cache, change where the text grows beyond `switch` tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": switch}
    config = AutoConfig.for_model(
        "phi3",
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        pad_token_id=0,
        eos_token_id=None,
        sliding_window=None,
        max_position_embeddings=512,
        original_max_position_embeddings=switch,
        rope_parameters=rope | {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def long_rope():
    return long_rope_model(SWITCH, 100)


def generated(model, cache, length, tokens):
    return model.generate(IDS[:, :length], **cache_argument(model, cache), max_new_tokens=tokens, do_sample=False)


def raw_cache(model):
    spec = spec_of(model)
    return CompressedCache(spec, spec.uniform(RAW))


def test_a_model_that_will_drop_its_cache_is_named_with_the_length(long_rope):
    with pytest.warns(UserWarning, match=rf"Phi3ForCausalLM drops a cache of up to {SWITCH} tokens when the text reaches 65"):
        full_allocation(long_rope, SCORERS["value_aware"]).cache(long_rope)


@pytest.mark.parametrize(("length", "tokens", "used"), [(40, 20, True), (40, 60, False), (80, 10, False)])
def test_whether_a_cache_was_used(length, tokens, used, long_rope):
    """Below the length, across it, beyond it."""
    use_attention(long_rope)
    cache = raw_cache(long_rope)
    out = generated(long_rope, cache, length, tokens)
    if used:
        cache.check_used(out.shape[1] - 1)
        return
    with pytest.raises(UnsupportedModelError, match=rf"holds {cache.get_seq_length()} of {length + tokens - 1} tokens"):
        cache.check_used(out.shape[1] - 1)


def test_a_context_beyond_the_length_is_filled_and_then_used(long_rope):
    """What the warning says to do."""
    use_attention(long_rope)
    cache = raw_cache(long_rope)
    cache.fill(long_rope, IDS[:, :79])
    out = generated(long_rope, cache, 80, 10)
    cache.check_used(out.shape[1] - 1)
    expected = long_rope.generate(IDS[:, :80], max_new_tokens=10, do_sample=False)
    assert torch.equal(out, expected)


def test_models_that_keep_their_cache_are_not_warned_of(embedded):
    assert lost_at(embedded[0]) is None
    assert lost_at(small_model("gemma3_text")) is None
    assert lost_at(small_model("phi3")) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = small_model("llama")
        full_allocation(model, SCORERS["value_aware"]).cache(model)


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_a_config_without_use_cache_gets_it_with_the_cache(kind):
    """Many are saved after training, where caches are of no use. With `generate`'s own cache the answer is the same."""
    model = small_model(kind)
    expected = generated(model, DynamicCache(config=model.config), 40, 10)
    use_attention(model)
    model.generation_config.use_cache = model.config.use_cache = False
    cache = raw_cache(model)
    assert torch.equal(generated(model, cache, 40, 10), expected)
    assert cache.get_seq_length() == 49


def test_a_text_is_not_read_twice_into_one_cache():
    model = small_model("llama")
    use_attention(model)
    cache = raw_cache(model)
    with pytest.raises(ValueError, match="reads the whole text again, but into a cache that holds 40 tokens"):
        model.generate(IDS[:, :40], **cache_argument(model, cache) | {"use_cache": False}, max_new_tokens=3)
    assert cache.get_seq_length() == 40 and not cache.is_broken
    with pytest.raises(TypeError, match="use_cache"):
        model.generate(IDS[:, :40], **cache_argument(model, cache), use_cache=False)


def test_a_pipeline_uses_the_cache():
    model, tokenizer = load()
    use_attention(model)
    spec = spec_of(model)
    text = "The farmer sold the red apple to the old sailor, and the sailor kept the apple in a box. " * 2
    cache = CompressedCache(spec, spec.uniform(HeadPlan("rotated", (Tier(1 / 2, 4, 4),))))
    with pytest.raises(UnsupportedModelError, match="holds 0 of 1 tokens"):
        cache.check_used()
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        text, **cache_argument(model, cache), max_new_tokens=5, do_sample=False, return_tensors=True
    )
    cache.check_used(len(answer[0]["generated_token_ids"]) - 1)
