"""Eviction alone: one cell, at 16 bits."""

import pytest

from ib_analysis.cache.plan import RAW, Recent
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.model.shape import CacheShape, LayerShape
from ib_analysis.policies import POLICIES
from ib_analysis.policies.uniform import uniform
from ib_analysis.scorers import SCORERS

SHAPE = CacheShape((LayerShape(2, 64), LayerShape(2, 64, sliding_window=16), LayerShape(2, 64)))
SPEC = CacheSpec(SHAPE, Recent(2, 6, 2), SCORERS["value_aware"])


def test_half_the_budget_is_spent_on_tokens_at_16_bits():
    (cell,) = POLICIES["prune-only"](SPEC, ByteLimit(SPEC, 1 / 2, 128))
    plans = [plan for row in cell.plans if row for plan in row]
    assert [plan.tiers[0].key_bits for plan in plans] == [plan.tiers[0].value_bits for plan in plans] == [16] * 4
    (share,) = {plan.kept_share for plan in plans}
    assert 0.4 < share < 0.5  # of the compressible tokens: sinks and window have theirs
    assert (cell.family, cell.setting) == ("prune-only", f"{share:.1%} of tokens at 16 bits")


@pytest.mark.parametrize("share", [1.0, 1 / 2, 1 / 8, 1 / 16])
def test_it_is_the_edge_of_the_uniform_grid(share):
    limit = ByteLimit(SPEC, share, 128)
    found = list(POLICIES["prune-only"](SPEC, limit))
    assert found == [cell for cell in uniform(SPEC, limit) if cell.family == "prune-only"]


def test_nothing_fits_the_least_of_budgets():
    assert list(POLICIES["prune-only"](SPEC, ByteLimit(SPEC, 1 / 1000, 128))) == []


def test_packed_storage_takes_a_little_even_at_16_bits():
    """The whole budget does not hold all tokens in packed storage, whose lengths and pairs count, too."""
    limit = ByteLimit(SPEC, 1.0, 128)
    (cell,) = POLICIES["prune-only"](SPEC, limit)
    assert limit.excess(SPEC.uniform(RAW)) > 0
    assert all(0.9 < plan.kept_share < 1 for row in cell.plans if row for plan in row)
