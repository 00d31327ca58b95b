"""Bytes of plans, and the limit that they keep to, at one length and at all later ones."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ib_kernels import FORMATS, tokens_nbytes

import ib_analysis.cache.spec as ib_spec
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.key_bases import KeyBases
from ib_analysis.cache.plan import EVICTED, RAW, HeadPlan, Recent, Tier
from ib_analysis.cache.spec import LONGEST, ByteLimit, CacheSpec
from ib_analysis.errors import BudgetError, CalibrationError
from ib_analysis.model.shape import CacheShape, LayerShape
from ib_analysis.scorers import SCORERS, SnapKV
from ib_analysis.search.candidates import head_options

untimed = settings(deadline=None)

VALUE_AWARE = SCORERS["value_aware"]
SHAPE = CacheShape((LayerShape(2, 32), LayerShape(1, 32, sliding_window=8)))
OPTIONS = head_options(tuple(FORMATS))
RECENTS = st.builds(Recent, st.integers(0, 8), st.integers(1, 40), st.integers(1, 16), st.integers(0, 60))
SPECS = st.builds(CacheSpec, st.just(SHAPE), RECENTS, st.just(VALUE_AWARE))
PLANS = st.tuples(st.tuples(st.sampled_from(OPTIONS), st.sampled_from(OPTIONS)), st.none())
LIMITS = st.builds(ByteLimit, SPECS, st.floats(0.05, 1), st.integers(1, 150))


def bytes_over(limit, plans, lengths):
    """Bytes above the share at each length, one length at a time."""
    full = limit.share * SHAPE.bytes_per_token
    return np.array([limit.spec.nbytes(plans, int(length)) - full * length for length in lengths])


def test_bases_that_no_plan_needs_are_left_out():
    shape = CacheShape((LayerShape(1, 4), LayerShape(1, 4), LayerShape(1, 4)))
    bases = KeyBases((torch.eye(4).half()[None],) * 3)
    spec = CacheSpec(shape, Recent(1, 2, 1), VALUE_AWARE, bases)
    raw, coded = HeadPlan("spectral", (Tier(1.0, 16, 4),)), HeadPlan("spectral", (Tier(0.5, 16, 16), Tier(0.5, 2, 4)))
    assert spec.for_plans(((raw,), (coded,), None)) == replace(spec, bases=bases.only([1]))
    assert spec.for_plans(((raw,), (EVICTED,), None)).bases is None


def test_plans_without_their_bases_are_refused():
    shape = CacheShape((LayerShape(1, 4), LayerShape(1, 4)))
    spec = CacheSpec(shape, Recent(1, 2, 1), VALUE_AWARE, KeyBases((None, torch.eye(4).half()[None])))
    coded = HeadPlan("spectral", (Tier(0.5, 2, 4),))
    assert spec.layer_bases(1, [None, coded]) is not None and spec.layer_bases(0, [None, RAW, EVICTED]) is None
    for broken in (spec, replace(spec, bases=None)):
        with pytest.raises(CalibrationError, match="layer 0"):
            broken.layer_bases(0, [coded])
        with pytest.raises(CalibrationError, match="layer 0"):
            CompressedCache(broken, ((coded,), None))


def test_bytes_add_up():
    shape = CacheShape((LayerShape(2, 64), LayerShape(2, 64, sliding_window=8)))
    spec = CacheSpec(shape, Recent(4, 10, 2), VALUE_AWARE)
    plans = ((HeadPlan("kivi", (Tier(0.5, 4, 2),)), HeadPlan("rotated")), None)
    length, tokens = 100, 86
    expected = 14 * 2 * 2 * 2 * 64 + tokens_nbytes("kivi", 43, 64, 4, 2)
    assert spec.recent.compressible(length) == tokens
    assert spec.recent_bytes(length) == 14 * 2 * 2 * 2 * 64
    assert spec.nbytes(plans, length) == expected
    assert spec.nbytes(plans, np.array([length, length]))[1] == expected


def test_a_layer_that_is_left_as_it_is_counts_16_bits():
    shape = CacheShape((LayerShape(2, 64), LayerShape(2, 32), LayerShape(2, 64, sliding_window=8)))
    spec = CacheSpec(shape, Recent(4, 10, 2), VALUE_AWARE)
    plans = ((HeadPlan("rotated"),) * 2, None, None)
    assert spec.nbytes(plans, 100) == 14 * 2 * 2 * 2 * 64 + 100 * 2 * 2 * 2 * 32
    assert spec.nbytes(spec.full_plans, np.array([7]))[0] == 7 * shape.bytes_per_token


@untimed
@given(SPECS, st.integers(0, 400))
def test_evicting_all_leaves_sinks_and_window(spec, length):
    assert spec.nbytes(spec.null_plans, length) == spec.recent_bytes(length)
    assert spec.nbytes(spec.full_plans, length) == length * SHAPE.bytes_per_token


def test_plans_for_all_heads_and_for_one():
    shape = CacheShape((LayerShape(2, 64), LayerShape(3, 64, sliding_window=8), LayerShape(1, 64)))
    spec = CacheSpec(shape, Recent(4, 10, 2), VALUE_AWARE)
    assert spec.uniform(RAW) == ((RAW, RAW), None, (RAW,))
    assert spec.null_plans == ((EVICTED, EVICTED), None, (EVICTED,))
    assert spec.full_plans == (None, None, None)
    assert spec.single_head((0, 1), RAW) == [[None, RAW], None, None]


def test_mean_tier():
    shape = CacheShape((LayerShape(2, 64), LayerShape(1, 64, sliding_window=8), LayerShape(2, 64)))
    spec = CacheSpec(shape, Recent(4, 10, 2), VALUE_AWARE)
    plans = ((HeadPlan("kivi", (Tier(0.25, 8, 4), Tier(0.5, 2, 2))), EVICTED), None, None)
    found = spec.mean_tier(plans)
    assert found["token_share"] == pytest.approx((0.75 + 0 + 1 + 1) / 4)  # a layer that is left as it is keeps all
    assert found["key_bits"] == pytest.approx((0.25 * 8 + 0.5 * 2 + 2 * 16) / 2.75)
    assert found["value_bits"] == pytest.approx((0.25 * 4 + 0.5 * 2 + 2 * 16) / 2.75)
    nothing = spec.mean_tier(spec.null_plans)
    assert nothing["token_share"] == 0 and math.isnan(nothing["key_bits"]) and math.isnan(nothing["value_bits"])


@pytest.mark.parametrize("scorer", [*SCORERS.values(), SnapKV(window=16)], ids=[*SCORERS, "with a field"])
def test_json_gives_the_spec_back(scorer):
    spec = CacheSpec(SHAPE, Recent(4, 10, 2), scorer)
    content = json.loads(json.dumps(spec.to_json()))
    assert CacheSpec.from_json(content) == spec
    content["pinned"] = content.pop("recent")  # as version 1 wrote it
    assert CacheSpec.from_json(content) == spec


@untimed
@given(LIMITS)
def test_a_limit_counts_sinks_and_window(limit):
    full = SHAPE.bytes_per_token * limit.context_length
    assert limit.nbytes == math.floor(limit.share * full)
    assert limit.spare == limit.nbytes - limit.spec.nbytes(limit.spec.null_plans, limit.context_length)


@untimed
@given(LIMITS, st.lists(st.integers(0, 20_000), max_size=4))
def test_a_limit_is_never_lowered_below_sinks_and_window(limit, steps):
    lowered = limit
    for step in steps:
        lowered = lowered.lowered(step)
    assert lowered.spare == (limit.spare if limit.spare < 0 else max(0, limit.spare - sum(steps)))
    if limit.spare >= 0:
        assert lowered.nbytes >= limit.spec.recent_bytes(limit.context_length)
    assert replace(lowered, lowered_bytes=0) == limit


@untimed
@given(LIMITS, PLANS, st.integers(0, 20_000))
def test_a_lowered_limit_is_still_the_same_share(limit, plans, nbytes):
    assert limit.lowered(nbytes).excess(plans) == limit.excess(plans)


@pytest.mark.slow
@untimed
@given(LIMITS, PLANS)
def test_excess_is_the_largest_at_any_later_length(limit, plans):
    length, flush = limit.context_length, limit.spec.recent.flush
    over = bytes_over(limit, plans, range(length, LONGEST * length + flush + 1))

    def most(longest):
        return max(0, math.ceil(over[: longest - length + 1].max()))

    assert most(LONGEST * length) <= limit.excess(plans) <= most(LONGEST * length + flush)


@pytest.mark.slow
@untimed
@given(LIMITS, PLANS)
def test_minimum_context_is_the_first_length_from_which_on_all_fit(limit, plans):
    lengths = range(1, LONGEST * limit.context_length + 1)
    fits = bytes_over(limit, plans, lengths) <= 0
    if not fits[-1]:
        with pytest.raises(BudgetError, match=rf"even at {lengths[-1]} tokens"):
            limit.minimum_context(plans)
        return
    expected = next(length for length in reversed(lengths) if length == 1 or not fits[length - 2])
    assert limit.minimum_context(plans) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ib_spec, "BLOCK", 7)
        assert limit.minimum_context(plans) == expected
    if limit.excess(plans) == 0:
        assert expected <= limit.context_length


@untimed
@given(SPECS, st.integers(1, 150))
def test_check_names_the_least_share_that_fits(spec, length):
    with pytest.raises(BudgetError, match="ask for at least") as refused:
        ByteLimit(spec, 1e-4, length).check()
    (named,) = re.findall(r"at least ([0-9.e-]+),", str(refused.value))
    least = float(named)
    assert 0 < least <= 1
    ByteLimit(spec, least, length).check()
    with pytest.raises(BudgetError):
        ByteLimit(spec, 0.997 * least, length).check()


@untimed
@given(LIMITS)
def test_check_passes_where_sinks_and_window_fit_at_every_later_length(limit):
    lengths = range(limit.context_length, LONGEST * limit.context_length + 1)
    fits = (bytes_over(limit, limit.spec.null_plans, lengths) <= 0).all()
    try:
        limit.check()
    except BudgetError:
        assert not fits
    else:
        assert fits
