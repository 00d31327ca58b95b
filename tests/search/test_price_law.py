"""Losses that were measured stay, the others follow the law of their head, and draws are as wide as they are wrong."""

import numpy as np
import pytest

from ib_analysis.search.price_law import HEAD_SPREAD, TINY_BITS, price_law


@pytest.fixture
def prices():
    return np.random.default_rng(0).lognormal(-5, 2, (6, 200))


def nothing(prices):
    return np.full(prices.shape, np.nan)


def test_nothing_measured_is_prices(prices):
    law = price_law(prices, nothing(prices), nothing(prices))
    np.testing.assert_allclose(law.expected, prices + TINY_BITS, rtol=1e-12)
    logs = np.log([law.draw(np.random.default_rng(seed)) for seed in range(200)])
    assert logs.std(0).mean() == pytest.approx(HEAD_SPREAD, rel=0.15)


def test_what_is_measured_on_all_prompts_stays(prices):
    losses, errors = nothing(prices), nothing(prices)
    losses[2, 5], errors[2, 5] = 3 * prices[2, 5], 0.0
    law = price_law(prices, losses, errors)
    for table in (law.expected, *(law.draw(np.random.default_rng(seed)) for seed in range(3))):
        assert table[2, 5] == pytest.approx(losses[2, 5] + TINY_BITS, rel=1e-6)


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_the_law_of_a_head_is_found_from_few_of_its_options(prices, slope):
    """Ratios of 1 to 20 that differ between heads and grow with the price: 8 of 200 options tell the others within a fifth."""
    rng = np.random.default_rng(1)
    truth = prices * np.exp(rng.uniform(0, 2, (6, 1)) + slope * (np.log(prices) + 5)) * rng.lognormal(0, 0.1, prices.shape)
    losses, errors = nothing(prices), nothing(prices)
    order = np.argsort(prices, axis=1)[:, 10:190:22]
    np.put_along_axis(losses, order, np.take_along_axis(truth, order, 1), 1)
    errors[~np.isnan(losses)] = 0.0
    found = np.log(price_law(prices, losses, errors).expected / truth)
    inner = np.argsort(prices, axis=1)[:, 10:186]
    assert np.take_along_axis(found, inner, 1).std() < 0.2
    assert np.log(prices / truth).std() > 0.5


def test_a_measured_loss_with_an_error_counts_less(prices):
    losses, errors = nothing(prices), nothing(prices)
    losses[0, 0] = 10 * prices[0, 0]
    logs = []
    for share in (0.0, 0.5, 5.0):
        errors[0, 0] = share * losses[0, 0]
        logs.append(float(np.log(price_law(prices, losses, errors).expected[0, 0] / prices[0, 0])))
    assert logs[0] == pytest.approx(np.log(10), rel=1e-3) and logs[0] > logs[1] > logs[2] > 0


def test_draws_are_as_wide_as_expectations_are_wrong(prices):
    """Losses drawn from the law itself: what is expected from a few of them is off by what draws say."""
    rng = np.random.default_rng(2)
    truth = price_law(prices, nothing(prices), nothing(prices)).draw(rng)
    losses, errors = nothing(prices), nothing(prices)
    losses[:, :10], errors[:, :10] = truth[:, :10], 0.0
    law = price_law(prices, losses, errors)
    wrong = np.log(law.expected / truth)[:, 10:]
    drawn = np.log([law.draw(rng) / law.expected for _ in range(100)])[:, :, 10:].std(0)
    assert (wrong**2).mean() == pytest.approx((drawn**2).mean(), rel=0.5)
