"""Plans of heads, and the tokens that stay at 16 bits."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ib_kernels import FORMATS, tokens_nbytes

from ib_analysis.cache.plan import (
    BITS,
    EVICTED,
    FULL,
    MAX_FLUSH,
    MAX_QUANTIZED,
    MAX_SINKS,
    MAX_WINDOW,
    QUANTIZED_FORM,
    RAW,
    HeadPlan,
    Recent,
    Tier,
    plan_of,
    precisions,
)
from ib_analysis.search.candidates import head_options

untimed = settings(deadline=None)

OPTIONS = head_options(tuple(FORMATS))
RECENTS = st.builds(Recent, st.integers(0, 8), st.integers(1, 40), st.integers(1, 16), st.integers(0, 60))


@untimed
@given(st.sampled_from(OPTIONS), st.integers(0, 3000))
def test_a_longer_cache_never_needs_an_evicted_token_back(plan, tokens):
    now, later = np.array(plan.counts(tokens)), np.array(plan.counts(tokens + 1))
    assert now.sum() <= tokens
    if plan.tiers:
        assert (later >= now).all()
        assert later.sum() - now.sum() <= 1


@untimed
@given(st.sampled_from(OPTIONS), st.integers(1, 3000))
def test_counts_are_the_shares(plan, tokens):
    for tier, count in zip(plan.tiers, plan.counts(tokens)):
        assert abs(count - tier.token_share * tokens) <= 2


@untimed
@given(st.sampled_from(OPTIONS), st.integers(0, 3000), st.sampled_from([32, 64]))
def test_bytes_of_a_head_are_those_of_its_tiers(plan, tokens, head_dim):
    found = plan.nbytes(tokens, head_dim)
    runs = [
        tokens_nbytes(plan.format, count, head_dim, tier.key_bits, tier.value_bits)
        for tier, count in zip(plan.tiers, plan.counts(tokens))
    ]
    assert found == (sum(runs) if tokens else 0)  # nothing is stored before there is anything to compress
    assert plan.nbytes(np.array([0, tokens]), head_dim).tolist() == [0, found]


@untimed
@given(RECENTS, st.integers(0, 500))
def test_tokens_are_at_16_bits_quantized_or_compressible(recent, length):
    past, compressible = recent.past_window(length), recent.compressible(length)
    assert 0 <= past <= max(0, length - recent.sinks - recent.window)
    assert past % recent.flush == 0
    assert length - past <= max(recent.max_tokens, min(length, recent.sinks + recent.window))
    assert past - compressible == min(past, recent.quantized)
    assert recent.past_window(np.array([length]))[0] == past
    assert recent.compressible(np.array([length]))[0] == compressible


@untimed
@given(RECENTS, st.integers(0, 500))
def test_tokens_leave_just_after_that_length(recent, length):
    found = recent.before_leaving(length)
    assert 0 <= found - length < recent.flush
    if found >= recent.max_tokens:
        assert recent.past_window(found + 1) == recent.past_window(found) + recent.flush
        assert found - recent.past_window(found) == recent.max_tokens


@untimed
@given(st.floats(1e-4, 1), st.integers(1, 10**5), st.sampled_from([64, 80, 96, 128, 256]))
def test_sinks_and_windows_take_at_most_a_quarter_of_a_budget(share, length, head_dim):
    recent = Recent.within(share, length)
    assert 1 <= recent.sinks <= MAX_SINKS and 1 <= recent.window <= MAX_WINDOW and 1 <= recent.flush <= MAX_FLUSH
    assert recent.max_tokens <= max(2, share * length / 8 + 0.5)  # at least a sink and a token of the window
    quantized_bytes = tokens_nbytes(QUANTIZED_FORM[0], recent.quantized, head_dim, *QUANTIZED_FORM[1:])
    once_bytes = tokens_nbytes(QUANTIZED_FORM[0], 0, head_dim, *QUANTIZED_FORM[1:])
    assert recent.quantized <= MAX_QUANTIZED and quantized_bytes - once_bytes <= share * length / 8 * 4 * head_dim


def test_what_every_head_keeps_in_words():
    assert str(Recent(1, 6, 1)) == "1 sink and the 6 newest tokens at 16 bits"
    assert str(Recent(4, 9, 4, 55)) == "4 sinks and the 9 to 12 newest tokens at 16 bits, 55 before these at 4 bits"


def test_one_plan_of_each_head():
    plans = (None, (RAW, EVICTED))
    assert plan_of(plans, (0, 1)) is None
    assert [plan_of(plans, (1, h)) for h in range(2)] == [RAW, EVICTED]


def test_precisions_are_all_pairs_of_bits_in_every_format_and_16_bits_once():
    found = precisions(FORMATS)
    assert len(set(found)) == len(found) == len(FORMATS) * len(BITS) ** 2 + 1
    assert [cell for cell in found if FULL[0] in cell[1]] == [(RAW.format, FULL)]


@pytest.mark.parametrize("plan", [EVICTED, RAW, HeadPlan("rotated", (Tier(0.3, 4, 2), Tier(0.25, 2, 3)))], ids=str)
def test_json_gives_the_plan_back(plan):
    content = json.loads(json.dumps(asdict(plan)))
    assert HeadPlan.from_json(content) == plan
    for tier in content["tiers"]:
        tier["share"] = tier.pop("token_share")  # as version 1 wrote it
    assert HeadPlan.from_json(content) == plan
