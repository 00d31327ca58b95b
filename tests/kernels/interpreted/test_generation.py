"""Text from a model with a compressed cache: by the kernels as by plain torch."""

import os

import pytest
import torch
from ib_kernels.backends import VARIABLE, default_backend
from transformers import AutoModelForCausalLM, LlamaConfig

from ib_analysis.cache.attention import cache_argument, use_attention
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.key_bases import KeyBases
from ib_analysis.cache.plan import HeadPlan, Recent, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.shape import cache_shape
from ib_analysis.scorers import SCORERS

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")

PROMPT = "The farmer sold the red apple to the old sailor, and the sailor kept the apple in a box near the river. " * 6
FOLLOW_UP = 6  # tokens of the prompt that come after the cache is filled
PLANS = (
    (HeadPlan("kivi", (Tier(0.3, 4, 4), Tier(0.6, 2, 2))), HeadPlan("rotated", (Tier(0.9, 3, 2),))),
    (HeadPlan("spectral", (Tier(0.3, 4, 4), Tier(0.6, 2, 4))), HeadPlan("kivi", (Tier(0.5, 16, 16),))),
    (HeadPlan("rotated", (Tier(0.5, 4, 4), Tier(0.3, 4, 4))), HeadPlan("rotated")),
    (HeadPlan("rotated", (Tier(0.8, 2, 8),)), HeadPlan("kivi", (Tier(0.8, 3, 3),))),
)


def generate(model, ids, mask, new_tokens, backend, monkeypatch):
    """Greedy tokens [B, n] and logits [n, B, V], and the cache."""
    monkeypatch.setenv(VARIABLE, backend)
    use_attention(model)
    shape, generator = cache_shape(model.config), torch.Generator().manual_seed(0)
    sizes = [(layer.kv_heads, layer.head_dim, layer.head_dim) for layer in shape.layers]
    bases = KeyBases(tuple(torch.linalg.qr(torch.randn(size, generator=generator))[0].half() for size in sizes))
    spec = CacheSpec(shape, Recent(3, 5, 4), SCORERS["value_aware"], bases)
    cache = CompressedCache(spec, PLANS[: len(spec.shape.layers)])
    filled = cache_argument(model, cache)
    with torch.no_grad():
        model(ids[:, :-FOLLOW_UP], attention_mask=mask[:, :-FOLLOW_UP], **filled, logits_to_keep=1)
    count = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    returned = {"output_logits": True, "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=mask, **filled, **count, **returned, do_sample=False)
    for layer in cache.layers:
        assert layer.backend == backend
        assert (layer.schedule is not None) == (backend == "triton")
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits), cache


def assert_alike(model, ids, mask, new_tokens, monkeypatch):
    tokens, logits, cache = generate(model, ids, mask, new_tokens, "triton", monkeypatch)
    expected_tokens, expected_logits, expected_cache = generate(model, ids, mask, new_tokens, "reference", monkeypatch)
    assert torch.equal(tokens, expected_tokens)
    assert (logits - expected_logits).abs().max() < 0.02 * expected_logits.std()
    assert cache.nbytes == expected_cache.nbytes


def test_the_embedded_model_continues_as_with_the_reference(embedded, monkeypatch):
    """A follow-up of several tokens, single steps, and two flushes of the window in between."""
    model, tokenizer = embedded
    ids = torch.tensor(tokenizer(PROMPT)["input_ids"])[None, :130]
    assert ids.shape[1] == 130
    assert_alike(model, ids, torch.ones_like(ids), 8, monkeypatch)


@pytest.fixture(scope="module")
def tiny():
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    config = LlamaConfig(**size, num_key_value_heads=2, vocab_size=100, pad_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)  # so that attention is far from uniform
    return model


def test_a_padded_batch_continues_as_with_the_reference(tiny, monkeypatch):
    ids = torch.randint(3, 99, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    assert_alike(tiny, ids, mask, 2, monkeypatch)


def test_kernels_asked_for_where_none_can_run(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a GPU"):
        default_backend(torch.device("cpu"))
