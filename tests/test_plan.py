"""Counts and bytes of plans."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ib_analysis.formats.packed import tokens_nbytes
from ib_analysis.options import head_options
from ib_analysis.plan import LONGEST, HeadPlan, Pinned, Tier, excess_bytes, plans_nbytes
from ib_analysis.shape import CacheShape, LayerShape

OPTIONS = head_options()
pinned = st.builds(Pinned, st.integers(0, 8), st.integers(1, 40), st.integers(1, 16))


@given(st.sampled_from(OPTIONS), st.integers(0, 3000))
def test_a_longer_cache_never_needs_an_evicted_token_back(plan, tokens):
    now, later = np.array(plan.counts(tokens)), np.array(plan.counts(tokens + 1))
    assert now.sum() <= tokens
    if plan.tiers:
        assert (later >= now).all()
        assert later.sum() - now.sum() <= 1


@given(st.sampled_from(OPTIONS), st.integers(1, 3000))
def test_counts_are_the_shares(plan, tokens):
    for tier, count in zip(plan.tiers, plan.counts(tokens)):
        assert abs(count - tier.share * tokens) <= 2


@given(pinned, st.integers(0, 500))
def test_tokens_are_pinned_or_compressible(pinned, length):
    compressible = pinned.compressible(length)
    assert 0 <= compressible <= max(0, length - pinned.sinks - pinned.window)
    assert compressible % pinned.flush == 0
    assert length - compressible <= max(pinned.most, min(length, pinned.sinks + pinned.window))
    assert pinned.compressible(np.array([length]))[0] == compressible


def test_bytes_add_up():
    shape = CacheShape((LayerShape(2, 64), LayerShape(2, 64, sliding_window=8)))
    plans = ((HeadPlan("kivi", (Tier(0.5, 4, 2),)), HeadPlan("rotated")), None)
    length, kept = 100, Pinned(4, 10, 2)
    tokens = 86
    expected = 14 * 2 * 2 * 2 * 64 + tokens_nbytes("kivi", 43, 64, 4, 2)
    assert kept.compressible(length) == tokens
    assert plans_nbytes(shape, plans, kept, length) == expected
    assert plans_nbytes(shape, plans, kept, np.array([length, length]))[1] == expected


def test_a_layer_that_is_left_as_it_is_counts_16_bits():
    shape = CacheShape((LayerShape(2, 64), LayerShape(2, 32), LayerShape(2, 64, sliding_window=8)))
    plans = ((HeadPlan("rotated"),) * 2, None, None)
    kept = Pinned(4, 10, 2)
    assert plans_nbytes(shape, plans, kept, 100) == 14 * 2 * 2 * 2 * 64 + 100 * 2 * 2 * 2 * 32
    assert plans_nbytes(shape, (None,) * 3, kept, np.array([7]))[0] == 7 * shape.bytes_per_token


@given(st.sampled_from(OPTIONS), st.sampled_from(OPTIONS), pinned, st.integers(1, 150), st.floats(0.05, 1))
def test_excess_is_the_largest_at_any_later_length(first, second, pinned, length, share):
    shape = CacheShape((LayerShape(2, 32), LayerShape(1, 32, sliding_window=8)))
    plans = ((first, second), None)

    def most(longest):
        later = np.arange(length, longest + 1)
        return max(0, math.ceil((plans_nbytes(shape, plans, pinned, later) - share * shape.bytes_per_token * later).max()))

    excess = excess_bytes(shape, plans, pinned, share, length)
    assert most(LONGEST * length) <= excess <= most(LONGEST * length + pinned.flush)
