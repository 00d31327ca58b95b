"""The uniform grid: within the limit, and no larger cell would fit."""

from fractions import Fraction

import pytest

from ib_analysis.options import precisions
from ib_analysis.plan import HeadPlan, Pinned, Tier, plans_nbytes
from ib_analysis.policies import POLICIES
from ib_analysis.shape import CacheShape, LayerShape

SHAPE = CacheShape((LayerShape(2, 64), LayerShape(2, 64, sliding_window=16), LayerShape(2, 64)))
PINNED = Pinned(2, 6, 2)
LENGTH = 128


def limit(share):
    return int(share * SHAPE.bytes_per_token * LENGTH)


def first_plan(cell):
    return next(row[0] for row in cell if row)


@pytest.mark.parametrize("share", [Fraction(1, 2), Fraction(1, 4), Fraction(1, 8)])
def test_cells_are_the_largest_that_fit(share):
    cells = POLICIES["uniform"](SHAPE, PINNED, LENGTH, limit(share))
    tokens = PINNED.compressible(LENGTH)
    assert len(set(map(str, map(first_plan, cells)))) == len(cells)
    for cell in cells:
        assert cell[1] is None
        assert plans_nbytes(SHAPE, cell, PINNED, LENGTH) <= limit(share)
        plan = first_plan(cell)
        count = plan.counts(tokens)[0]
        if count < tokens:
            tier = plan.tiers[0]
            larger = HeadPlan(plan.format, (Tier((count + 1) / tokens, tier.key_bits, tier.value_bits),))
            more = tuple(None if row is None else (larger,) * 2 for row in cell)
            assert plans_nbytes(SHAPE, more, PINNED, LENGTH) > limit(share)


def test_edges_of_the_grid():
    half = POLICIES["prune_only"](SHAPE, PINNED, LENGTH, limit(1 / 2))
    assert [plan.tiers[0].key_bits for cell in half for row in cell if row for plan in row] == [16] * 4
    every = POLICIES["quantize_only"](SHAPE, PINNED, LENGTH, limit(1 / 2))
    assert all(plan.kept_share == 1 for cell in every for row in cell if row for plan in row)
    assert 0 < len(every) < len(precisions())
    assert POLICIES["quantize_only"](SHAPE, PINNED, LENGTH, limit(1 / 10)) == []
    assert POLICIES["uniform"](SHAPE, PINNED, LENGTH, 100) == []
