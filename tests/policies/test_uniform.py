"""The uniform grid: within the limit, and no larger cell would fit."""

import re
from dataclasses import replace

import pytest

from ib_analysis.cache.plan import FULL, HeadPlan, Recent, Tier, precisions
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.model.shape import CacheShape, LayerShape
from ib_analysis.policies.uniform import uniform
from ib_analysis.scorers import SCORERS

SHAPE = CacheShape((LayerShape(2, 64), LayerShape(2, 64, sliding_window=16), LayerShape(2, 64)))
SPEC = CacheSpec(SHAPE, Recent(2, 6, 2), SCORERS["value_aware"])
LENGTH = 128
TEXT = re.compile(
    r"(?P<share>[0-9.]+)% of tokens(?: at 16 bits|, (?P<format>\w+), keys (?P<keys>\d+) values (?P<values>\d+) bits)"
)


def first_plan(cell):
    return next(row[0] for row in cell.plans if row)


@pytest.mark.parametrize("share", [1 / 2, 1 / 4, 1 / 8])
@pytest.mark.parametrize("recent", [Recent(2, 6, 2), Recent(2, 7, 5)], ids=str)  # the second keeps more at 129 tokens than at 128
def test_cells_are_the_largest_that_fit_from_that_length_on(share, recent):
    spec = replace(SPEC, recent=recent)
    limit = ByteLimit(spec, share, LENGTH)
    cells = list(uniform(spec, limit))
    tokens = recent.compressible(LENGTH)
    assert len({cell.plans for cell in cells}) == len(cells) > 10
    larger_by = []
    for cell in cells:
        plan = first_plan(cell)
        assert cell.plans == spec.uniform(plan) and cell.plans[1] is None
        assert limit.excess(cell.plans) == 0
        count, tier = plan.counts(tokens)[0], plan.tiers[0]
        for more in range(count + 1, tokens + 1):
            larger = HeadPlan(plan.format, (Tier(more / tokens, tier.key_bits, tier.value_bits),))
            if limit.excess(spec.uniform(larger)) == 0:
                larger_by.append((plan, more - count))
    assert larger_by == []


def test_nothing_fits_the_least_of_budgets():
    assert list(uniform(SPEC, ByteLimit(SPEC, 1 / 1000, LENGTH))) == []


def test_nothing_is_proposed_where_nothing_can_be_compressed():
    assert list(uniform(SPEC, ByteLimit(SPEC, 1.0, 8))) == []


def test_every_precision_is_tried_once():
    cells = list(uniform(SPEC, ByteLimit(SPEC, 1.0, LENGTH)))
    found = [(plan.format, (plan.tiers[0].key_bits, plan.tiers[0].value_bits)) for plan in map(first_plan, cells)]
    assert found == precisions(SPEC.formats)


@pytest.mark.parametrize("share", [1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16])
def test_labels_say_what_the_plans_are(share):
    cells = list(uniform(SPEC, ByteLimit(SPEC, share, LENGTH)))
    assert len({(cell.family, cell.setting) for cell in cells}) == len(cells)
    for cell in cells:
        (plan,) = {plan for row in cell.plans if row for plan in row}
        (tier,) = plan.tiers
        bits = tier.key_bits, tier.value_bits
        said = TEXT.fullmatch(cell.setting)
        assert said is not None
        assert float(said["share"]) / 100 == pytest.approx(tier.token_share, abs=0.0005)
        if bits == FULL:
            assert said["format"] is None and cell.family == "prune-only"
        else:
            assert (said["format"], int(said["keys"]), int(said["values"])) == (plan.format, *bits)
            assert cell.family == ("quantize-only" if tier.token_share == 1 else "quantized pruning")
