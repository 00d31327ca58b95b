"""Every argument of `generate` and of a model's forward that could change what a cache means: honoured, or refused by name.

A cache that keeps all tokens at 16 bits must do what DynamicCache does.
"""

from copy import deepcopy

import pytest
import torch
from transformers import DynamicCache

from ib_analysis.cache.attention import cache_argument, use_attention
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.plan import RAW
from tests.cache.test_compressed import padded_batch, small_model, spec_of

IDS, MASK = padded_batch(2)
HONOURED_BY_GENERATE: dict[str, dict[str, object]] = {
    "attention_mask (padding on the left)": {"attention_mask": MASK},
    "num_beams": {"num_beams": 3},
    "num_beams, num_return_sequences": {"num_beams": 4, "num_return_sequences": 2},
    "do_sample, num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "do_sample, top_k, temperature": {"do_sample": True, "top_k": 20, "temperature": 0.7},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "prefill_chunk_size": {"prefill_chunk_size": 16},
    "max_length": {"max_length": 50, "max_new_tokens": None},
    "inputs_embeds": {"inputs_embeds": True},
}
REFUSED_BY_GENERATE: dict[str, tuple[dict[str, object], str]] = {
    "assistant_model": ({"assistant_model": True}, "a cache that can be cropped"),
    "prompt_lookup_num_tokens": ({"prompt_lookup_num_tokens": 3}, "a cache that can be cropped"),
    "cache_implementation": ({"cache_implementation": "static"}, "cache_implementation"),
}


def generated(model, cache, arguments):
    arguments = {"max_new_tokens": 12, "do_sample": False, **arguments}
    assisted = "assistant_model" in arguments or "prompt_lookup_num_tokens" in arguments
    inputs = {"input_ids": IDS[:1] if assisted else IDS}  # transformers assists one sequence at a time
    if arguments.pop("inputs_embeds", None):
        inputs = {"inputs_embeds": model.get_input_embeddings()(IDS)}
    if arguments.get("assistant_model"):
        arguments["assistant_model"] = deepcopy(model)
    torch.manual_seed(3)
    return model.generate(**inputs, **cache_argument(model, cache), **arguments)


def caches():
    model = small_model("llama")
    full = DynamicCache(config=model.config)
    spec = spec_of(model)
    return model, full, CompressedCache(spec, spec.uniform(RAW))


@pytest.mark.parametrize("name", HONOURED_BY_GENERATE)
def test_generate_does_what_it_does_with_the_full_cache(name):
    model, full, cache = caches()
    expected = generated(model, full, HONOURED_BY_GENERATE[name])
    use_attention(model)
    found = generated(model, cache, HONOURED_BY_GENERATE[name])
    if "return_dict_in_generate" not in HONOURED_BY_GENERATE[name]:
        assert torch.equal(found, expected)
        return
    assert torch.equal(found.sequences, expected.sequences)
    for key in ("logits", "hidden_states"):
        if key in expected and expected[key] is not None:
            last, expected_last = (out[key][-1][-1] for out in (found, expected))
            assert (last - expected_last).abs().max() < 0.01 * expected_last.std()


@pytest.mark.parametrize("name", REFUSED_BY_GENERATE)
def test_generate_refuses_before_it_answers(name):
    model, _, cache = caches()
    use_attention(model)
    arguments, said = REFUSED_BY_GENERATE[name]
    with pytest.raises(ValueError, match=said):
        generated(model, cache, arguments)
    assert not cache.is_broken  # it may hold the prompt, whole


BLOCKS = ((0, 25), (25, 26), (26, 27), (27, 34), (34, 40))


FORWARD = (
    "attention_mask [B, T]",
    "attention_mask [B, 1, M, T], bool",
    "position_ids, with a hole",
    "cache_position",
    "logits_to_keep",
    "output_hidden_states",
)


def forward_arguments(name, begin, end):
    seen = MASK[:, :end]
    positions = (seen.cumsum(1) - 1).clamp(min=0)[:, begin:end]
    causal = torch.ones(end - begin, end, dtype=torch.bool).tril(begin)
    return {
        "attention_mask [B, T]": {"attention_mask": seen, "position_ids": positions},
        "attention_mask [B, 1, M, T], bool": {
            "attention_mask": causal & seen[:, None, None].bool(),
            "position_ids": positions,
        },
        "position_ids, with a hole": {"position_ids": torch.arange(begin, end)[None] + 7 * (begin > 25)},
        "cache_position": {"cache_position": torch.arange(begin, end)},
        "logits_to_keep": {"logits_to_keep": 1},
        "output_hidden_states": {"output_hidden_states": True},
    }[name]


@torch.no_grad()
def read(model, cache, name):
    outs = []
    for begin, end in BLOCKS:
        arguments = forward_arguments(name, begin, end)
        outs.append(model(IDS[:, begin:end], **cache_argument(model, cache), **arguments).logits)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("name", FORWARD)
def test_forward_does_what_it_does_with_the_full_cache(name):
    model, full, cache = caches()
    expected = read(model, full, name)
    use_attention(model)
    there = MASK.bool() if "attention_mask" in name else torch.ones(expected.shape[:2], dtype=torch.bool)
    assert (read(model, cache, name) - expected)[there].abs().max() < 0.01 * expected.std()


@torch.no_grad()
def test_masks_that_are_added_are_refused():
    model, _, cache = caches()
    use_attention(model)
    with pytest.raises(ValueError, match="masks of bool"):
        model(IDS[:, :25], attention_mask=torch.zeros(2, 1, 25, 25), **cache_argument(model, cache))


@torch.no_grad()
def test_attention_weights_are_not_returned_as_with_sdpa():
    model, full, cache = caches()
    expected = model(IDS, output_attentions=True, **cache_argument(model, full)).attentions
    use_attention(model)
    assert model(IDS, output_attentions=True, **cache_argument(model, cache)).attentions == expected == ()
