"""Quantization alone: all tokens, at every precision that fits."""

import pytest

from ib_analysis.cache.plan import HeadPlan, Recent, Tier, precisions
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.model.shape import CacheShape, LayerShape
from ib_analysis.policies import POLICIES
from ib_analysis.policies.uniform import uniform
from ib_analysis.scorers import SCORERS

SHAPE = CacheShape((LayerShape(2, 64), LayerShape(2, 64, sliding_window=16), LayerShape(2, 64)))
SPEC = CacheSpec(SHAPE, Recent(2, 6, 2), SCORERS["value_aware"])
LENGTH = 128


def test_all_tokens_are_kept():
    every = list(POLICIES["quantize-only"](SPEC, ByteLimit(SPEC, 1 / 2, LENGTH)))
    assert all(plan.kept_share == 1 for cell in every for row in cell.plans if row for plan in row)
    assert 0 < len(every) < len(precisions(SPEC.formats))
    assert {cell.family for cell in every} == {"quantize-only"}


@pytest.mark.parametrize("share", [1.0, 1 / 2, 1 / 4, 1 / 5])
def test_every_precision_whose_tokens_all_fit_is_there(share):
    limit = ByteLimit(SPEC, share, LENGTH)
    whole = [SPEC.uniform(HeadPlan(fmt, (Tier(1.0, *bits),))) for fmt, bits in precisions(SPEC.formats)]
    found = list(POLICIES["quantize-only"](SPEC, limit))
    assert [cell.plans for cell in found] == [plans for plans in whole if limit.excess(plans) == 0]
    assert found == [cell for cell in uniform(SPEC, limit) if cell.plans in whole]


def test_nothing_fits_a_small_budget():
    assert list(POLICIES["quantize-only"](SPEC, ByteLimit(SPEC, 1 / 10, LENGTH))) == []
