"""Summaries of measured losses."""

import numpy as np
import pytest

from ib_analysis.policies import POLICIES
from ib_analysis.replay.measurement import Measurement, Sample, best_plans, bootstrap_interval

pytestmark = pytest.mark.slow


def sample(kl_bits):
    count = len(kl_bits)
    accuracy = np.full((count, kl_bits.shape[1]), np.nan)
    accuracy[0] = 1.0
    return Sample(kl_bits, accuracy, np.full(count, 2.0), np.ones(count), range(500, 500 + count))


def test_retained_is_information_less_loss_and_may_be_negative():
    found = sample(np.array([[1.0, 3.0], [2.0, 3.0]]))
    assert found.measurement(0).retained_bits == pytest.approx(0.5)
    assert found.measurement(1).retained_share == pytest.approx(-0.5)
    assert found.measurement(0).accuracy == 1.0


def test_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).exponential(size=400)
    low, high = bootstrap_interval(values)
    error = values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_one_prompt_has_no_interval():
    found = sample(np.array([[1.0, 2.0]]))
    assert np.isnan(found.measurement(0).loss_interval_bits).all()
    assert "loses 1.0000 (too few prompts for an interval)" in str(found.measurement(0))
    ratio, low, high = found.ratio_interval(0, 1)
    assert ratio == 0.5 and np.isnan([low, high]).all()


def test_text_without_information():
    found = Measurement(3, 0.0, (0.0, 0.0), 0.0, None, None)
    assert str(found) == "retains 0.000 of 0.000 bits per token, loses 0.0000 [0.0000, 0.0000] (3 prompts)"


def test_lengths_of_the_contexts_are_told():
    assert sample(np.ones((3, 1))).measurement(0).lengths == (500, 502)
    assert str(sample(np.ones((3, 1))).measurement(0)).endswith("(3 prompts at 500 to 502 tokens)")
    assert str(sample(np.ones((1, 1))).measurement(0)).endswith("(1 prompt at 500 tokens)")


def test_ratio_is_paired():
    noise = np.random.default_rng(2).exponential(size=(50, 1))
    ratio, low, high = sample(np.hstack([noise, 2 * noise])).ratio_interval(0, 1)
    assert (ratio, low, high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("share", [1 / 4, 1 / 8])
def test_best_plan_is_that_of_measuring_all(bench, share):
    profile = bench.profile
    cells = [cell.plans for cell in POLICIES["uniform"](profile.spec, profile.limit(share))]
    means = bench.validation.measure(cells)[0].mean(0)
    assert means[best_plans(bench.validation, [cells])[0]] == pytest.approx(means.min(), rel=1e-9)
    assert best_plans(bench.validation, [cells[:1]])[0] == 0


def test_best_plans_of_several_grids_are_those_of_each(bench):
    profile = bench.profile
    grids = [[cell.plans for cell in POLICIES["uniform"](profile.spec, profile.limit(share))] for share in (1 / 4, 1 / 8)]
    assert best_plans(bench.validation, grids) == [best_plans(bench.validation, [grid])[0] for grid in grids]


def test_json_round_trip():
    found = sample(np.ones((3, 1))).measurement(0)
    content = {**found.__dict__, "loss_interval_bits": list(found.loss_interval_bits)}
    assert Measurement.from_json(content) == found
    assert Measurement.from_json(None) is None
