"""The trained lower bounds: their formulas, golden numbers, and what they refuse or flag."""

from math import log, log2

import numpy as np
import pytest
import torch

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators import MINE, NWJ, InfoNCE, infonce, mine, nwj
from ib_analysis.estimators.estimate import NOT_CONVERGED, SATURATED, TOO_FEW
from ib_analysis.estimators.known_information import KNOWN_TASKS, normal

pytestmark = pytest.mark.slow

SPARSE, DENSE, QUANTIZED = "multinormal sparse 5x5", "multinormal dense 25x25", "quantized gaussian 64x64 4 bit"
METHODS = [InfoNCE(), MINE(), NWJ()]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


@pytest.fixture(scope="module")
def trained(draws):
    """Estimates of InfoNCE on two draws of 10,000 samples, which are trained at once."""
    return {name: InfoNCE().estimate(*draws(name, 10_000, 2)) for name in (SPARSE, DENSE)}


def test_infonce_finds_nearly_all_in_few_dimensions(trained):
    assert trained[SPARSE].bits.mean() * log(2) == pytest.approx(1.0217, abs=0.1)


def test_infonce_finds_most_in_many_dimensions(trained):
    assert 1.1 <= trained[DENSE].bits.mean() * log(2) <= 1.2922


def test_lower_bounds_lie_below_the_truth(trained):
    for name, estimate in trained.items():
        low, _ = estimate.interval
        assert (low < KNOWN_TASKS[name].information_bits).all()


def test_saturation_is_flagged_at_a_head(draws):
    x, y = draws(QUANTIZED, 1200, 1)
    estimate = InfoNCE().estimate(x, y)
    assert estimate.bits < log2(256)
    assert SATURATED in estimate.flags


@each_method
def test_each_head_gets_its_own_critic(method):
    """Two heads at once: independent variables, and dependent ones of which one is far from normal."""
    rng = np.random.default_rng(0)
    (x, y), (_, other_y) = normal(0.9).sample(1000, rng), normal(0.6).sample(1000, rng)
    estimate = method.estimate(np.stack([x, np.exp(x)]), np.stack([other_y, y]))
    assert estimate.bits == pytest.approx([0.0, normal(0.9).information_bits], abs=0.2)
    assert SATURATED not in estimate.flags


@each_method
def test_shuffled_pairs_share_nothing(method):
    rng = np.random.default_rng(0)
    low, high = method.estimate(rng.standard_normal((2, 600, 3)), rng.standard_normal((2, 600, 2))).interval
    assert ((low <= 1e-9) & (high >= -1e-9)).all()


def test_training_that_more_samples_would_help_is_flagged(trained):
    assert trained[DENSE].flags[NOT_CONVERGED].all()


def test_training_that_never_beats_its_start_is_flagged():
    """One sample at 3000 deviations, where the exponential of every critic explodes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 2))
    y = x + 0.3 * rng.standard_normal((4000, 2))
    x[0], y[0] = 3000 * x[0], 3000 * y[0]
    estimate = MINE().estimate(x, y)
    assert estimate.bits > 1 or NOT_CONVERGED in estimate.flags


def test_documents_are_not_split_between_training_and_measuring():
    """With both copies of a sample on different sides, the critic could recognise what it was trained on."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 300, 30))
    copies = np.repeat(np.arange(300), 4)
    leaked = InfoNCE().estimate(x[copies], y[copies])
    honest = InfoNCE().estimate(x[copies], y[copies], copies)
    assert honest.interval[0] <= 0 < leaked.interval[0]


@each_method
def test_too_few_are_refused(method):
    x, y = normal().sample(100, np.random.default_rng(0))
    with pytest.raises(EstimatorError, match="63 samples"):
        method.estimate(x[:63], y[:63])
    with pytest.raises(EstimatorError, match="7 documents"):
        method.estimate(x, y, np.arange(100) % 7)
    assert TOO_FEW in method.estimate(x[:80], y[:80], np.arange(80) % 9).flags


def plain_means(scores):
    """Mean score of pairs, and mean of e^score of all others, in a plain loop."""
    count = len(scores)
    others = [np.exp(scores[i, j]) for i in range(count) for j in range(count) if i != j]
    return np.mean([scores[i, i] for i in range(count)]), np.mean(others)


def test_formulas():
    scores = np.random.default_rng(0).standard_normal((3, 7, 7))
    of = {module: module.contributions(torch.tensor(scores)).numpy() for module in (infonce, mine, nwj)}
    for i, batch in enumerate(scores):
        pairs, others = plain_means(batch)
        assert of[mine][i].mean() == pytest.approx(pairs - log(others))
        assert of[nwj][i].mean() == pytest.approx(pairs - others + 1)
        expected = [batch[j, j] - log(np.mean(np.exp(batch[j]))) for j in range(7)]
        assert of[infonce][i] == pytest.approx(expected)


@pytest.mark.parametrize("module", [mine, nwj])
def test_contributions_say_how_a_sample_moves_the_bound(module):
    """Against leaving the sample out, to first order."""
    scores = 0.3 * np.random.default_rng(0).standard_normal((200, 200))
    contributions = module.contributions(torch.tensor(scores)).numpy()
    left_out = np.array([module.contributions(torch.tensor(np.delete(np.delete(scores, i, 0), i, 1))).mean() for i in range(200)])
    moved = 199 * (contributions.mean() - left_out)
    assert np.corrcoef(moved, contributions)[0, 1] > 0.999
    assert moved.std() == pytest.approx(contributions.std(), rel=0.02)
