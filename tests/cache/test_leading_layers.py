"""Layers at full precision before the first compressed one: what this refuses has not changed them."""

import pytest
import torch
from transformers import DynamicCache

from ib_analysis.cache.attention import cache_argument, use_attention
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.plan import HeadPlan, Tier
from tests.cache.test_compressed import padded_batch, small_model, spec_of

HALF = HeadPlan("rotated", (Tier(1 / 2, 4, 4),))


def led_cache(kind):
    """(model, an empty cache whose first layer is not compressed): a sliding window in gemma3_text, of 16 tokens."""
    model = small_model(kind)
    use_attention(model)
    spec = spec_of(model)
    plans = tuple(
        None if layer.sliding_window or i == 0 else (HALF,) * layer.kv_heads for i, layer in enumerate(spec.shape.layers)
    )
    return model, CompressedCache(spec, plans)


def hiding():
    mask = torch.ones(2, 1, 3, 33, dtype=torch.bool).tril(30)
    mask[..., 8:12] = False
    return mask


REFUSED = {
    "hides compressed tokens": (range(30, 33), {"attention_mask": hiding()}, "hides from the token"),
    "float": (range(30, 33), {"attention_mask": torch.zeros(2, 1, 3, 33)}, "masks of bool"),
    "of another batch": (range(30, 33), {}, "holds 2 sequences, not 1"),
    "numbers too large": (range(30, 33), {"inputs_embeds": torch.full((2, 3, 64), 3.0)}, "float16"),
}


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_a_refused_step_leaves_every_layer_as_it_was(name, kind):
    model, cache = led_cache(kind)
    _, other = led_cache(kind)
    ids, _ = padded_batch(2)
    for each in (cache, other):
        model(ids[:, :30], **cache_argument(model, each))
    places, arguments, said = REFUSED[name]
    inputs = {"input_ids": ids[:1, places] if "batch" in name else ids[:, places]}
    before = cache.nbytes
    if kind == "gemma3_text" and "attention_mask" in arguments:  # which takes one for each kind of layer
        window = torch.ones(2, 1, 3, 18, dtype=torch.bool)
        arguments = {"attention_mask": {"full_attention": arguments["attention_mask"], "sliding_attention": window}}
    if "inputs_embeds" in arguments:
        weights = model.model.layers[1].self_attn.v_proj.weight
        kept = weights.clone()
        weights.mul_(1e6)
        inputs = {}
    with pytest.raises(ValueError, match=said):
        model(**inputs, **arguments, **cache_argument(model, cache))
    if not inputs:
        weights.copy_(kept)
    assert cache.get_seq_length() == 30 and cache.nbytes == before and not cache.is_broken
    after = (model(ids[:, 30:], **cache_argument(model, each)).logits for each in (cache, other))
    assert torch.equal(*after)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@torch.no_grad()
def test_a_refused_first_step_leaves_an_empty_cache(kind):
    model, cache = led_cache(kind)
    ids, mask = padded_batch(2)
    with pytest.raises(ValueError, match="padding on the left"):
        model(ids, attention_mask=mask.flip(1), **cache_argument(model, cache))
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    found = model(ids, attention_mask=mask, **cache_argument(model, cache)).logits
    expected = model(ids, attention_mask=mask, **cache_argument(model, DynamicCache(config=model.config))).logits
    assert (found - expected)[mask.bool()].abs().max() < 1e-4 * expected.std()


@torch.no_grad()
def test_nothing_of_a_window_is_kept_for_later():
    """What a layer held before a step would double its memory."""
    model, cache = led_cache("gemma3_text")
    model(padded_batch(2)[0], **cache_argument(model, cache))
    assert cache.leading.layers and not cache.leading._held


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@torch.no_grad()
def test_a_reset_forgets_layers_at_full_precision_too(kind):
    model, cache = led_cache(kind)
    ids, _ = padded_batch(2)
    first = model(ids, **cache_argument(model, cache)).logits
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    assert torch.equal(model(ids, **cache_argument(model, cache)).logits, first)
