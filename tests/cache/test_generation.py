"""Text by greedy decoding, with the full cache or a compressed one."""

from copy import deepcopy

import pytest
import torch

from ib_analysis.cache.attention import use_attention
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.generation import generate_text
from ib_analysis.cache.plan import Recent
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.errors import IBAnalysisError, UnsupportedModelError
from ib_analysis.model.load import load
from ib_analysis.model.shape import cache_shape
from ib_analysis.scorers import SCORERS
from tests.cache.test_lost_cache import long_rope_model

TEXT = "The farmer sold the red apple to the old sailor, and the sailor kept the apple in a box near the river. " * 2


@pytest.fixture(scope="module")
def loaded():
    """(model, tokenizer) of our own: the model is switched to our attention function."""
    model, tokenizer = load()
    use_attention(model)
    return model, tokenizer


def compressed(model, plans):
    spec = CacheSpec(cache_shape(model.config), Recent(2, 8, 4), SCORERS["value_aware"])
    return CompressedCache(spec, getattr(spec, plans))


def test_the_full_cache_gives_what_generate_gives(embedded):
    model, tokenizer = embedded
    inputs = tokenizer(TEXT, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert generate_text(model, tokenizer, TEXT, 8) == tokenizer.decode(expected)


def test_a_cache_that_compresses_nothing_gives_the_same(loaded):
    model, tokenizer = loaded
    cache = compressed(model, "full_plans")
    assert generate_text(model, tokenizer, TEXT, 8, cache) == generate_text(model, tokenizer, TEXT, 8)


def test_every_token_is_predicted_from_the_compressed_cache(loaded):
    """Also the first one: what is evicted is gone before the last token of the text is read."""
    model, tokenizer = loaded
    first_logits = []
    for plans in ("full_plans", "null_plans"):
        cache = compressed(model, plans)
        seen: list[torch.Tensor] = []
        hook = model.register_forward_hook(lambda module, given, out, seen=seen: seen.append(out.logits[0, -1]))
        generate_text(model, tokenizer, TEXT, 1, cache)
        hook.remove()
        assert cache.get_seq_length() == len(tokenizer(TEXT).input_ids)
        assert len(seen) == 2  # one pass fills the cache, the other reads the last token
        first_logits.append(seen)
    assert torch.equal(first_logits[0][0], first_logits[1][0])
    assert (first_logits[0][1] - first_logits[1][1]).abs().max() > 0.1


def test_a_chat_gets_an_answer(embedded):
    """The text is what a user says in the template."""
    model, tokenizer = embedded
    chatting = deepcopy(tokenizer)
    chatting.chat_template = (
        "<s>{{ messages[0]['role'] }}: {{ messages[0]['content'] }}{% if add_generation_prompt %} Then{% endif %}"
    )
    answer = generate_text(model, chatting, TEXT, 8, chat=True)
    assert answer == generate_text(model, tokenizer, f"user: {TEXT} Then", 8)
    assert generate_text(model, chatting, TEXT, 8) == generate_text(model, tokenizer, TEXT, 8) != answer
    with pytest.raises(IBAnalysisError, match="no chat template"):
        generate_text(model, tokenizer, TEXT, 8, chat=True)


def test_refusals(embedded):
    model, tokenizer = embedded
    with pytest.raises(IBAnalysisError, match="cannot generate 0 tokens: ask for at least one"):
        generate_text(model, tokenizer, TEXT, 0)
    with pytest.raises(IBAnalysisError, match="fewer than two tokens"):
        generate_text(model, tokenizer, "", 3)


def test_a_cache_that_the_model_does_not_use_is_named(loaded):
    """Models with two sets of frequencies begin a new cache where the text grows beyond the length of the first."""
    _, tokenizer = loaded
    model = long_rope_model(64, len(tokenizer))
    use_attention(model)
    text = TEXT[: len(TEXT) // 2]  # 44 tokens
    generate_text(model, tokenizer, text, 10, compressed(model, "null_plans"))
    with pytest.raises(UnsupportedModelError, match="the model did not use the cache"):
        generate_text(model, tokenizer, text, 40, compressed(model, "null_plans"))
