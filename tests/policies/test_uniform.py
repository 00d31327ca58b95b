"""The uniform grid: within the limit, and no larger cell would fit."""

import pytest

from ib_analysis.options import precisions
from ib_analysis.plan import HeadPlan, Pinned, Tier, excess_bytes
from ib_analysis.policies import POLICIES
from ib_analysis.shape import CacheShape, LayerShape

SHAPE = CacheShape((LayerShape(2, 64), LayerShape(2, 64, sliding_window=16), LayerShape(2, 64)))
PINNED = Pinned(2, 6, 2)
LENGTH = 128


def first_plan(cell):
    return next(row[0] for row in cell if row)


@pytest.mark.parametrize("share", [1 / 2, 1 / 4, 1 / 8])
@pytest.mark.parametrize("pinned", [Pinned(2, 6, 2), Pinned(2, 7, 5)], ids=str)  # the second keeps more at 129 tokens than at 128
def test_cells_are_the_largest_that_fit_from_that_length_on(share, pinned):
    cells = POLICIES["uniform"](SHAPE, pinned, LENGTH, share)
    tokens = pinned.compressible(LENGTH)
    assert len(set(map(str, map(first_plan, cells)))) == len(cells) > 10
    larger_by = []
    for cell in cells:
        assert cell[1] is None
        assert excess_bytes(SHAPE, cell, pinned, share, LENGTH) == 0
        plan = first_plan(cell)
        count, tier = plan.counts(tokens)[0], plan.tiers[0]
        for more in range(count + 1, tokens + 1):
            larger = HeadPlan(plan.format, (Tier(more / tokens, tier.key_bits, tier.value_bits),))
            if excess_bytes(SHAPE, tuple(None if row is None else (larger,) * 2 for row in cell), pinned, share, LENGTH) == 0:
                larger_by.append((plan, more - count))
    assert larger_by == []


def test_edges_of_the_grid():
    half = POLICIES["prune_only"](SHAPE, PINNED, LENGTH, 1 / 2)
    assert [plan.tiers[0].key_bits for cell in half for row in cell if row for plan in row] == [16] * 4
    every = POLICIES["quantize_only"](SHAPE, PINNED, LENGTH, 1 / 2)
    assert all(plan.kept_share == 1 for cell in every for row in cell if row for plan in row)
    assert 0 < len(every) < len(precisions())
    assert POLICIES["quantize_only"](SHAPE, PINNED, LENGTH, 1 / 10) == []
    assert POLICIES["uniform"](SHAPE, PINNED, LENGTH, 1 / 1000) == []
