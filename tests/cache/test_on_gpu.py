"""The compressed cache on a GPU: the kernels against plain torch on the same device."""

import logging

import pytest
import torch
from ib_kernels import PackedTokens, backends
from ib_kernels.backends import VARIABLE
from transformers import AutoModelForCausalLM, LlamaConfig

import ib_analysis as ib
from ib_analysis.cache.attention import cache_argument, use_attention
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.plan import HeadPlan, Recent, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.shape import cache_shape
from ib_analysis.scorers import SCORERS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HEADS = (HeadPlan("kivi", (Tier(0.3, 4, 4), Tier(0.6, 2, 2))), HeadPlan("rotated", (Tier(0.9, 3, 2),)))
TEXT = "The farmer sold the red apple to the old sailor, and the sailor kept the apple in a box near the river. "


def continuation(model, ids, tokens):
    spec = CacheSpec(cache_shape(model.config), Recent(4, 16, 16, quantized=32), SCORERS["value_aware"])
    cache = CompressedCache(spec, (HEADS,) * len(model.model.layers))
    out = model.generate(
        ids, **cache_argument(model, cache), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return out[0, ids.shape[1] :], cache.layers[0].backend


def test_the_same_256_greedy_tokens_as_the_reference(monkeypatch):
    model, tokenizer = ib.load()
    model = model.to("cuda")
    use_attention(model)
    ids = tokenizer(TEXT * 12, return_tensors="pt")["input_ids"][:, :256].to("cuda")
    found = []
    for backend in backends.BACKENDS:
        monkeypatch.setenv(VARIABLE, backend)
        tokens, used = continuation(model, ids, 256)
        assert used == backend
        found.append(tokens)
    assert torch.equal(*found)


def test_a_head_dim_without_kernels_runs_in_plain_torch_and_says_so_once(caplog):
    backends._plain_torch.cache_clear()
    size = {"hidden_size": 80, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 40}
    config = LlamaConfig(**size, num_key_value_heads=2, vocab_size=100, pad_token_id=0, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval().to("cuda")
    use_attention(model)
    _, used = continuation(model, torch.randint(3, 99, (1, 80), device="cuda"), 4)
    assert used == "reference"
    assert len([record for record in caplog.records if record.levelno == logging.WARNING and "40" in record.message]) == 1


def test_appending_by_the_kernels_gives_the_bits_of_plain_torch():
    keys, values = torch.randn(2, 140, 64, device="cuda")
    lengths = torch.tensor([70, 20], device="cuda")
    for fmt in ("kivi", "rotated", "spectral"):
        made = []
        for device in ("cuda", "cpu"):
            packed = PackedTokens.pack(fmt, keys[:90].to(device), values[:90].to(device), lengths.to(device), 3, 4)
            packed.append(keys[90:].to(device), values[90:].to(device), torch.tensor([10, 40], device=device))
            made.append(packed.to("cpu").tensors())
        for name in made[0]:
            assert torch.equal(made[0][name].view(torch.int16), made[1][name].view(torch.int16)), name
