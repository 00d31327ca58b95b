"""A replay predicts what the packed cache predicts."""

import math
from random import Random

import pytest
import torch

from ib_analysis import load
from ib_analysis.attention import cache_argument
from ib_analysis.cache import CompressedCache
from ib_analysis.episodes import make_episodes
from ib_analysis.plan import HeadPlan, Pinned, Tier
from ib_analysis.replay import Replay
from ib_analysis.scorers import SCORERS
from ib_analysis.shape import cache_shape
from ib_analysis.tasks import TASKS

PINNED = Pinned(2, 5, 2)
HEADS = (HeadPlan("kivi", (Tier(0.2, 4, 3), Tier(0.5, 2, 2))), HeadPlan("rotated", (Tier(0.5, 3, 4),)))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("aware", [True, False])
def test_replay_is_the_packed_cache(task, aware):
    model, tokenizer = load()
    shape = cache_shape(model.config)
    episode = make_episodes(model, tokenizer, [TASKS[task](Random(task), 256)], question_aware=aware)[0]
    replay = Replay(model, shape, PINNED, SCORERS["value_aware"], episode)
    plans = (HEADS,) * len(shape.layers)
    packed = packed_loss_bits(replay, plans)
    kl_bits, _ = replay.measure([plans, [None] * len(shape.layers)])
    assert kl_bits[0] > 0
    assert kl_bits[0] == pytest.approx(packed, rel=0.02, abs=1e-4)
    assert kl_bits[1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replay_of_a_16_bit_model_is_the_packed_cache(dtype, small_llama, small_prompts):
    model = small_llama.to(dtype)
    shape = cache_shape(model.config)
    replay = Replay(model, shape, PINNED, SCORERS["value_aware"], make_episodes(model, None, small_prompts[:1])[0])
    plans = (HEADS,) * len(shape.layers)
    found = float(replay.measure([plans])[0])
    assert found > 0.01
    assert found == pytest.approx(packed_loss_bits(replay, plans), rel=0.05)


def packed_loss_bits(replay, plans):
    """KL(full || compressed) in bits per predicted token, from a cache that is packed."""
    model, episode = replay.model, replay.episode
    cache = CompressedCache(replay.shape, plans, PINNED, SCORERS["value_aware"])
    with torch.no_grad():
        model(episode.prefill[None], **cache_argument(model, cache))
        logits = model(episode.followup[None], **cache_argument(model, cache)).logits[0, episode.predicting]
    full = replay.full_log_probs.double()
    return float((full.exp() * (full - logits.double().log_softmax(-1))).sum(-1).mean() / math.log(2))
