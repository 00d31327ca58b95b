"""Joint refinement: a lower measured loss, within the budget."""

import numpy as np
import pytest

from ib_analysis.cache.plan import Recent
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS
from ib_analysis.search.calibration import calibrate
from ib_analysis.search.refine import refine
from ib_analysis.search.worth_measuring import measure_worthwhile

pytestmark = pytest.mark.slow

RECENT = Recent(2, 5, 2)
LENGTH = 112
SHARE = 0.25


@pytest.fixture
def solved(small_llama, small_prompts):
    """(profile, replays, limit, the knapsack's choice within it)."""
    spec = CacheSpec(cache_shape(small_llama.config), RECENT, SCORERS["value_aware"])
    replays = Replays(small_llama, spec, make_examples(small_llama, None, small_prompts))
    profile = calibrate(replays, LENGTH, settings={})
    limit = profile.limit(SHARE)
    measure_worthwhile(profile, replays, [limit])
    return profile, replays, limit, profile.solve(limit).choice


def test_refined_plans_lose_less_and_stay_within_the_budget(solved):
    profile, replays, limit, choice = solved
    refined = refine(profile, replays, limit, choice)
    before, after = replays.measure([profile.plans(choice), profile.plans(refined)])[0].mean(0)
    assert after < before
    heads = np.arange(len(choice))
    assert profile.nbytes()[heads, refined].sum() <= limit.spare
    assert limit.excess(profile.plans(refined)) == 0


def test_nothing_is_tried_that_a_longer_cache_could_not_hold(solved):
    profile, replays, limit, choice = solved
    tight = ByteLimit(profile.spec, 1e-6, LENGTH, lowered_bytes=-limit.nbytes)  # the same bytes at LENGTH, hardly any beyond
    assert tight.spare == limit.spare
    assert (refine(profile, replays, tight, choice) == choice).all()
