"""The options of a head and their order."""

from ib_kernels import FORMATS

from ib_analysis.cache.plan import HeadPlan, Tier, precisions
from ib_analysis.search.candidates import dominates, head_options

OPTIONS = head_options(tuple(FORMATS))


def test_options_cover_what_they_should():
    assert len(set(OPTIONS)) == len(OPTIONS)
    assert OPTIONS[0].kept_share == 0
    assert any(plan.tiers == (Tier(1.0, 16, 16),) for plan in OPTIONS)
    assert {plan.format for plan in OPTIONS} == {"kivi", "rotated", "spectral"}
    assert any(plan.tiers and plan.tiers[0].key_bits > plan.tiers[0].value_bits for plan in OPTIONS)
    assert any(plan.tiers and plan.tiers[0].key_bits < plan.tiers[0].value_bits for plan in OPTIONS)
    assert any(len(plan.tiers) == 2 for plan in OPTIONS)
    assert all(0 <= plan.kept_share <= 1 for plan in OPTIONS)
    assert len(precisions(FORMATS)) == 3 * 16 + 1


def test_dominance_is_an_order():
    for a in OPTIONS[::7]:
        assert dominates(a, a)
        for b in OPTIONS[::5]:
            if dominates(a, b) and dominates(b, a):
                assert a.tiers == b.tiers
            for c in OPTIONS[::23]:
                if dominates(a, b) and dominates(b, c):
                    assert dominates(a, c)


def test_dominance_means_more_bytes():
    for a in OPTIONS:
        for b in OPTIONS:
            if dominates(a, b):
                assert a.nbytes(480, 64) >= b.nbytes(480, 64)


def test_two_tiers_against_one():
    two = HeadPlan("kivi", (Tier(0.25, 4, 4), Tier(0.5, 2, 2)))
    assert dominates(two, HeadPlan("kivi", (Tier(0.25, 4, 4),)))
    assert not dominates(two, HeadPlan("kivi", (Tier(0.5, 4, 4),)))
    assert dominates(HeadPlan("kivi", (Tier(0.75, 4, 4),)), two)
    assert not dominates(HeadPlan("rotated", (Tier(0.75, 4, 4),)), two)
