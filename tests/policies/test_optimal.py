"""Joint refinement: a lower measured loss, within the budget."""

import numpy as np
import pytest

from ib_analysis.calibration import Replays, calibrate, verify
from ib_analysis.episodes import make_episodes
from ib_analysis.plan import Pinned
from ib_analysis.policies.optimal import refine
from ib_analysis.shape import cache_shape

PINNED = Pinned(2, 5, 2)
LENGTH = 112
SHARE = 0.3


@pytest.fixture
def solved(small_llama, small_prompts):
    """(profile, replays, limit in bytes, the knapsack's choice within it)."""
    shape = cache_shape(small_llama.config)
    replays = Replays(small_llama, shape, PINNED, "value_aware", make_episodes(small_llama, None, small_prompts))
    profile = calibrate(replays, small_llama, PINNED, "value_aware", LENGTH, settings={})
    limit = int(SHARE * shape.bytes_per_token * LENGTH)
    verify(profile, replays, [limit])
    return profile, replays, limit, profile.solve(limit, profile.measured_bits).choice


def test_refined_plans_lose_less_and_stay_within_the_budget(solved):
    profile, replays, limit, choice = solved
    refined = refine(profile, replays, SHARE, limit, choice)
    before, after = replays.measure([profile.plans(choice), profile.plans(refined)])[0].mean(0)
    assert after < before
    heads = np.arange(len(choice))
    assert profile.nbytes()[heads, refined].sum() <= limit
    assert profile.excess_bytes(refined, SHARE) == 0


def test_nothing_is_tried_that_a_longer_cache_could_not_hold(solved):
    profile, replays, limit, choice = solved
    assert (refine(profile, replays, 1e-6, limit, choice) == choice).all()
