"""Losses by the gradient: the change of every head's output is exact, and small losses are predicted as they are measured."""

import copy
from random import Random

import numpy as np
import pytest
import torch
from ib_kernels import FORMATS, Format, MetadataRows
from scipy.stats import spearmanr
from transformers import Cache

from ib_analysis.cache.attention import borrowed, cache_argument
from ib_analysis.cache.plan import HeadPlan, Recent, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replay import Replay
from ib_analysis.scorers import SCORERS
from ib_analysis.search.candidates import head_options
from ib_analysis.search.gradient import _Attended, _score_gradients, gradient_losses
from ib_analysis.tasks import TASKS

pytestmark = pytest.mark.slow

OPTIONS = head_options()
RECENT = Recent(3, 6, 2)


def spec_of(model):
    return CacheSpec(cache_shape(model.config), RECENT, SCORERS["value_aware"])


def replay_of(embedded, task, number=0):
    model, tokenizer = embedded
    example = make_examples(model, tokenizer, [TASKS[task](Random(f"{task} {number}"), 256)])[0]
    return Replay(model, spec_of(model), example)


@pytest.mark.parametrize("option", [0, 3, 40, 77, 150, 200, 310, 330, 360])
def test_outputs_are_those_of_the_compressed_head(embedded, option):
    check_outputs(embedded, OPTIONS[option])


def test_outputs_of_a_format_that_fits_values_to_their_run(embedded, monkeypatch):
    monkeypatch.setitem(FORMATS, "shared", Format("shared", FORMATS["rotated"].keys, SharedRange()))
    check_outputs(embedded, HeadPlan("shared", (Tier(1 / 4, 4, 4), Tier(1 / 2, 2, 2))))


class SharedRange:
    """Values of a run share the largest of its first tokens: what they become depends on which are kept."""

    def metadata(self, head_dim):
        return {"scale": MetadataRows(1, tokens_per_row=0)}

    def fit(self, x, lengths):
        runs = x.split(lengths.tolist())
        return {"scale": torch.stack([run.abs().max() if len(run) else run.new_ones(()) for run in runs]).half()[:, None]}

    def quantize(self, x, lengths, bits, fitted):
        scale = fitted["scale"].float().repeat_interleave(lengths.long(), 0)
        return ((x / scale + 1) / 2 * (2**bits - 1)).round().clamp(0, 2**bits - 1).to(torch.uint8), fitted

    def dequantize(self, codes, metadata, lengths, bits):
        return (codes.float() / (2**bits - 1) * 2 - 1) * metadata["scale"].float().repeat_interleave(lengths.long(), 0)


def check_outputs(embedded, option):
    replay = replay_of(embedded, "text")
    answered, _ = _score_gradients(replay, torch.Generator().manual_seed(0))
    heads = replay.spec.shape.heads
    found = _Attended(replay, heads, answered).output(option)  # [U, G * M, D]
    for u, (layer, head) in enumerate(heads):
        layers = replay.followup_layers([replay.spec.single_head((layer, head), option)])
        with torch.no_grad(), borrowed(replay.model):
            replay.model(replay.example.followup[None], **cache_argument(replay.model, Cache(layers=layers)))
        expected = layers[layer].output[0].reshape(-1, *found.shape[1:])[head]
        torch.testing.assert_close(found[u], expected, atol=2e-3, rtol=2e-3)


def test_small_losses_are_predicted_as_they_are_measured(embedded):
    """8 to 3 bits of all tokens, each head alone, means over prompts of natural text."""
    plans = [HeadPlan(fmt, (Tier(1.0, bits, bits),)) for fmt in ("kivi", "rotated") for bits in (8, 4, 3)]
    predicted, measured = [], []
    for number in range(8):
        replay = replay_of(embedded, "text", number)
        predicted.append(gradient_losses(replay, plans, torch.Generator().manual_seed(number)).flatten())
        tried = [replay.spec.single_head(head, plan) for head in replay.spec.shape.heads for plan in plans]
        measured.append(replay.measure(tried)[0])
    guess, loss = (torch.stack(rows).mean(0).numpy() for rows in (predicted, measured))
    assert spearmanr(guess, loss).statistic > 0.9
    assert 0.5 < np.median(guess / loss) < 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_a_16_bit_model_are_those_of_its_weights_in_32(dtype, small_llama, small_prompts):
    losses = []
    for model in (small_llama.to(dtype), copy.deepcopy(small_llama).float()):
        example = make_examples(small_llama, None, small_prompts[:1])[0]
        replay = Replay(model, spec_of(model), example)
        losses.append(gradient_losses(replay, OPTIONS[::7], torch.Generator().manual_seed(0)).flatten().numpy())
    assert spearmanr(losses[0], losses[1]).statistic > 0.9


def test_a_caller_without_gradients(small_llama, small_prompts):
    example = make_examples(small_llama, None, small_prompts[:1])[0]
    replay = Replay(small_llama, spec_of(small_llama), example)
    expected = gradient_losses(replay, OPTIONS[::7], torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(gradient_losses(replay, OPTIONS[::7], torch.Generator().manual_seed(0)), expected)


def test_chunks_of_heads_change_nothing(embedded, monkeypatch):
    replay = replay_of(embedded, "needles")
    whole = gradient_losses(replay, OPTIONS[::30], torch.Generator().manual_seed(1))
    monkeypatch.setattr("ib_analysis.search.gradient.HELD_ELEMENTS", 1)
    alone = gradient_losses(replay, OPTIONS[::30], torch.Generator().manual_seed(1))
    torch.testing.assert_close(alone, whole, rtol=1e-3, atol=1e-12)
