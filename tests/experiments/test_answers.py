"""Losses along an answer are those of the compressed cache that reads it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from ib_analysis.cache.attention import borrowed, cache_argument
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.plan import HeadPlan, Recent, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.errors import CalibrationError, ProfileMismatchError
from ib_analysis.experiments.answers import answer_losses, answers_text
from ib_analysis.model.fingerprint import model_fingerprint
from ib_analysis.model.shape import cache_shape
from ib_analysis.scorers import SCORERS
from ib_analysis.search.allocation import Allocation

CONTEXT, TOKENS = 60, 70


def allocation_of(model, plan, recent):
    spec = CacheSpec(cache_shape(model.config), recent, SCORERS["value_aware"])
    return Allocation(
        model_fingerprint(model.config), spec, spec.uniform(plan), CONTEXT, 0.5, "by hand", 0.0, 0.0, 0.0, 0.0, validation=None
    )


@pytest.fixture
def texts():
    return list(torch.randint(0, 64, (10, CONTEXT + TOKENS + 3), generator=torch.Generator().manual_seed(0)))


def test_losses_are_those_of_the_cache_after_each_token(small_llama, texts):
    allocation = allocation_of(small_llama, HeadPlan("rotated", (Tier(0.5, 4, 4),)), Recent(2, 3, 2, quantized=5))
    before = small_llama.config._attn_implementation
    table = answer_losses(small_llama, allocation, texts, tokens=TOKENS)
    assert small_llama.config._attn_implementation == before
    assert table[["first_token", "last_token"]].values.tolist() == [[1, 32], [33, 64], [65, 70]]
    assert (table.texts == 10).all()
    ids = torch.stack(texts)[:, : CONTEXT + TOKENS]
    with torch.no_grad():
        full = small_llama(ids).logits[:, CONTEXT:].log_softmax(-1)
        cache = CompressedCache(allocation.spec, allocation.plans)
        with borrowed(small_llama):
            small_llama(ids[:, :CONTEXT], **cache_argument(small_llama, cache))
            steps = [
                small_llama(ids[:, i : i + 1], **cache_argument(small_llama, cache)).logits for i in range(CONTEXT, ids.shape[1])
            ]
    found = torch.cat(steps, 1).log_softmax(-1)
    kl_bits = ((full.exp() * (full - found)).sum(-1) / math.log(2)).numpy()
    expected = [kl_bits[:, a:b].mean() for a, b in ((0, 32), (32, 64), (64, 70))]
    np.testing.assert_allclose(table.kl_bits, expected, rtol=1e-3)
    assert (table.low_bits < table.kl_bits).all() and (table.kl_bits < table.high_bits).all()
    assert answers_text(table).count("\n") == 4


def test_nothing_is_lost_where_all_is_kept(small_llama, texts):
    allocation = allocation_of(small_llama, HeadPlan("rotated", (Tier(1.0, 16, 16),)), Recent(2, 3, 2))
    table = answer_losses(small_llama, allocation, texts, tokens=40, context_length=20)
    assert table.last_token.tolist() == [32, 40]
    assert (table.kl_bits < 1e-4).all()


def test_an_answer_beyond_the_model_s_positions_is_refused():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_positions=70, n_embd=16, n_layer=1, n_head=1)).eval()
    allocation = allocation_of(model, HeadPlan("rotated", (Tier(0.5, 4, 4),)), Recent(2, 3, 2))
    with pytest.raises(CalibrationError, match="fewer than 80 positions"):
        answer_losses(model, allocation, [torch.arange(81) % 64], tokens=20)


def test_texts_that_are_too_short_and_models_that_are_others_are_refused(small_llama, texts, embedded):
    allocation = allocation_of(small_llama, HeadPlan("rotated"), Recent(2, 3, 2))
    cases: tuple[tuple[Any, str], ...] = (
        ([*texts, texts[0][:100]], "text 10 has 100 tokens"),
        ([], "at least one"),
        ("text", "at least one"),
        (["text"], "needs a tokenizer"),
        ([texts[0].float()], "text 0 is a Tensor"),
        ([[{"role": "user"}]], "text 0 is a list"),
        ([texts[0].bool()], "text 0 is a Tensor"),
        ([texts[0] + 1], "outside of the model's vocabulary"),
        ((text for text in texts), "at least one"),
    )
    for bad, message in cases:
        with pytest.raises(CalibrationError, match=message):
            answer_losses(small_llama, allocation, bad, tokens=TOKENS)
    for wrong in ({"tokens": 0}, {"tokens": True}, {"tokens": 2.5}, {"context_length": -5}, {"context_length": 0}):
        with pytest.raises(CalibrationError, match="whole number of at least 1"):
            answer_losses(small_llama, allocation, texts, **wrong)
    with pytest.raises(ProfileMismatchError):
        answer_losses(embedded[0], allocation, texts)
