"""The table of an allocation's tiers: a row for each tier, bytes that add up to those of the plans."""

import pandas as pd
import pytest

from ib_analysis.cache.plan import EVICTED, HeadPlan, Recent, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.cache.table import COLUMNS, tier_table
from ib_analysis.model.shape import CacheShape, LayerShape
from ib_analysis.scorers import SCORERS

SHAPE = CacheShape((LayerShape(2, 32), LayerShape(2, 32, sliding_window=8), LayerShape(3, 64), LayerShape(1, 64)))
SPEC = CacheSpec(SHAPE, Recent(2, 6, 2), SCORERS["value_aware"])
TWO, ONE = HeadPlan("kivi", (Tier(0.25, 4, 2), Tier(0.5, 2, 3))), HeadPlan("rotated", (Tier(0.5, 3, 8),))
PLANS = ((TWO, EVICTED), None, (ONE, ONE, EVICTED), None)


def test_a_row_for_each_tier():
    rows = tier_table(SPEC, PLANS, 100).drop(columns="head_bytes")
    expected = [
        (0, 0, 0, "kivi", 0.25, 4, 2),
        (0, 0, 1, "kivi", 0.5, 2, 3),
        (0, 1, 0, "evicted", 0.0, 0, 0),
        (2, 0, 0, "rotated", 0.5, 3, 8),
        (2, 1, 0, "rotated", 0.5, 3, 8),
        (2, 2, 0, "evicted", 0.0, 0, 0),
        (3, 0, 0, "full", 1.0, 16, 16),
    ]
    pd.testing.assert_frame_equal(rows, pd.DataFrame(expected, columns=COLUMNS[:-1]))


@pytest.mark.parametrize("length", [1, 8, 9, 100, 333])
def test_bytes_of_heads_add_up_to_those_of_the_plans(length):
    heads = tier_table(SPEC, PLANS, length).drop_duplicates(["layer", "head"])
    assert heads.head_bytes.sum() + SPEC.recent_bytes(length) == SPEC.nbytes(PLANS, length)
