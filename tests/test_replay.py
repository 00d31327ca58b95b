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


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("aware", [True, False])
def test_replay_is_the_packed_cache(task, aware):
    model, tokenizer = load()
    shape = cache_shape(model.config)
    episode = make_episodes(model, tokenizer, [TASKS[task](Random(task), 256)], question_aware=aware)[0]
    replay = Replay(model, shape, PINNED, SCORERS["value_aware"], episode)
    heads = (HeadPlan("kivi", (Tier(0.2, 4, 3), Tier(0.5, 2, 2))), HeadPlan("rotated", (Tier(0.5, 3, 4),)))
    plans = (heads,) * len(shape.layers)
    cache = CompressedCache(shape, plans, PINNED, SCORERS["value_aware"])
    with torch.no_grad():
        model(episode.prefill[None], **cache_argument(model, cache))
        logits = model(episode.followup[None], **cache_argument(model, cache)).logits[0, episode.predicting]
    full = replay.full_log_probs.double()
    packed = (full.exp() * (full - logits.double().log_softmax(-1))).sum(-1).mean() / math.log(2)
    kl_bits, _ = replay.measure([plans, [None] * len(shape.layers)])
    assert kl_bits[0] > 0
    assert kl_bits[0] == pytest.approx(float(packed), rel=0.02, abs=1e-4)
    assert kl_bits[1] == pytest.approx(0, abs=1e-5)
