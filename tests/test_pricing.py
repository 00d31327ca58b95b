"""Gradient prices: the change of every head's output is exact, and small losses are priced as they are measured."""

import copy
from random import Random

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import Cache

from ib_analysis.attention import cache_argument
from ib_analysis.episodes import make_episodes
from ib_analysis.options import head_options
from ib_analysis.plan import HeadPlan, Pinned, Tier
from ib_analysis.pricing import _Parts, _score_gradients, gradient_prices
from ib_analysis.replay import Replay
from ib_analysis.scorers import SCORERS
from ib_analysis.shape import cache_shape
from ib_analysis.tasks import TASKS

OPTIONS = head_options()
PINNED = Pinned(3, 6, 2)


def replay_of(embedded, task, number=0):
    model, tokenizer = embedded
    episode = make_episodes(model, tokenizer, [TASKS[task](Random(f"{task} {number}"), 256)])[0]
    return Replay(model, cache_shape(model.config), PINNED, SCORERS["value_aware"], episode)


def single(replay, unit, plan):
    layer, head = unit
    row = [None] * replay.shape.layers[layer].kv_heads
    row[head] = plan
    return [row if i == layer else None for i in range(len(replay.layers))]


@pytest.mark.parametrize("option", [0, 3, 40, 77, 150, 200, 310, 330, 360])
def test_outputs_are_those_of_the_compressed_head(embedded, option):
    replay = replay_of(embedded, "text")
    answered, _ = _score_gradients(replay, torch.Generator().manual_seed(0))
    parts = _Parts(replay, replay.shape.heads, answered)
    found = parts.output(OPTIONS[option])  # [U, G * M, D]
    for u, unit in enumerate(replay.shape.heads):
        layers = replay.followup_layers([single(replay, unit, OPTIONS[option])])
        with torch.no_grad():
            replay.model(replay.episode.followup[None], **cache_argument(replay.model, Cache(layers=layers)))
        expected = layers[unit[0]].output[0].reshape(-1, *found.shape[1:])[unit[1]]
        torch.testing.assert_close(found[u], expected, atol=2e-3, rtol=2e-3)


def test_small_losses_are_priced_as_they_are_measured(embedded):
    """8 to 3 bits of all tokens, each head alone, means over prompts of natural text."""
    plans = [HeadPlan(fmt, (Tier(1.0, bits, bits),)) for fmt in ("kivi", "rotated") for bits in (8, 4, 3)]
    priced, measured = [], []
    for number in range(8):
        replay = replay_of(embedded, "text", number)
        priced.append(gradient_prices(replay, plans, torch.Generator().manual_seed(number)).flatten())
        tried = [single(replay, unit, plan) for unit in replay.shape.heads for plan in plans]
        measured.append(replay.measure(tried)[0])
    price, loss = (torch.stack(rows).mean(0).numpy() for rows in (priced, measured))
    assert spearmanr(price, loss).statistic > 0.9
    assert 0.5 < np.median(price / loss) < 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prices_of_a_16_bit_model_are_those_of_its_weights_in_32(dtype, small_llama, small_prompts):
    prices = []
    for model in (small_llama.to(dtype), copy.deepcopy(small_llama).float()):
        episode = make_episodes(small_llama, None, small_prompts[:1])[0]
        replay = Replay(model, cache_shape(model.config), PINNED, SCORERS["value_aware"], episode)
        prices.append(gradient_prices(replay, OPTIONS[::7], torch.Generator().manual_seed(0)).flatten().numpy())
    assert spearmanr(prices[0], prices[1]).statistic > 0.9


def test_a_caller_without_gradients(small_llama, small_prompts):
    episode = make_episodes(small_llama, None, small_prompts[:1])[0]
    replay = Replay(small_llama, cache_shape(small_llama.config), PINNED, SCORERS["value_aware"], episode)
    expected = gradient_prices(replay, OPTIONS[::7], torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(gradient_prices(replay, OPTIONS[::7], torch.Generator().manual_seed(0)), expected)


def test_chunks_of_heads_change_nothing(embedded, monkeypatch):
    replay = replay_of(embedded, "needles")
    whole = gradient_prices(replay, OPTIONS[::30], torch.Generator().manual_seed(1))
    monkeypatch.setattr("ib_analysis.pricing.HELD_ELEMENTS", 1)
    alone = gradient_prices(replay, OPTIONS[::30], torch.Generator().manual_seed(1))
    torch.testing.assert_close(alone, whole, rtol=1e-3, atol=1e-12)
