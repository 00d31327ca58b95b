"""A check of prices says how far measurement is from them, and goes through a file."""

from copy import deepcopy

import numpy as np
import pytest

from ib_analysis import Profile
from ib_analysis.search.price_check import HEADS, _compared, _sample, check_prices
from ib_analysis.search.profile import PriceCheck


def test_sampled_are_the_highest_prices_and_some_of_the_rest():
    prices = np.random.default_rng(0).permutation(200.0 ** np.linspace(0, 1, 100))
    heads = _sample(prices)
    assert len(set(heads.tolist())) == HEADS
    highest = np.argsort(-prices)
    assert set(highest[: HEADS // 2]) <= set(heads)
    assert highest[-1] in heads
    assert sorted(_sample(prices[:5])) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("factor", "holds"), [(1.0, True), (1.9, True), (0.6, True), (2.1, False), (0.4, False)])
def test_prices_hold_if_measurement_is_near_them(factor, holds):
    prices = np.random.default_rng(0).lognormal(0, 1, (8, 24))
    check = _compared(prices, factor * prices)
    assert check.ratio == pytest.approx(factor)
    assert check.ratio_interval == pytest.approx((factor, factor))
    assert check.rank_correlation == pytest.approx(1)
    assert check.holds == holds


def test_the_interval_is_over_prompts():
    rng = np.random.default_rng(0)
    prices = rng.lognormal(0, 1, (8, 24))
    low, high = _compared(prices, prices * rng.lognormal(0, 1, (8, 1))).ratio_interval
    assert low < 0.8 and high > 1.5


def test_where_nothing_is_lost_there_is_no_ratio():
    check = _compared(np.zeros((8, 24)), np.zeros((8, 24)))
    assert np.isnan(check.ratio) and np.isnan(check.rank_correlation)
    assert not check.holds


@pytest.mark.slow
def test_small_losses_are_near_their_prices_and_large_ones_are_not(bench, tmp_path):
    """On the embedded model 4-bit tokens lose what the gradient says, evicting all does not."""
    profile, replays = deepcopy(bench.profile), bench.calibration
    names = {str(option): number for number, option in enumerate(profile.options)}
    fine = next(
        number for name, number in names.items() if "rotated" in name and "token_share=1.0, key_bits=8, value_bits=8" in name
    )
    heads = len(profile.loss_bits)
    small, large = (check_prices(profile, replays, np.full(heads, option)) for option in (fine, 0))
    assert 0.5 < small.ratio < 2 < large.ratio
    assert not large.holds
    profile.checks |= {0.25: small, 0.125: large}
    profile.save(tmp_path / "profile.safetensors")
    assert Profile.load(tmp_path / "profile.safetensors").checks == {0.25: small, 0.125: large}


def test_from_json_is_what_was_written():
    check = PriceCheck(2, 3, 0.5, 1.0, (0.9, 1.1))
    assert PriceCheck.from_json({**vars(check), "ratio_interval": [0.9, 1.1]}) == check
    assert "2 heads measured on 3 prompts: 1.00 [0.90, 1.10]" in str(check)
