"""The Gaussian estimators against analytic information, their flags and intervals."""

from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators import CopulaGaussian, Gaussian
from ib_analysis.estimators.copula import normal_scores
from ib_analysis.estimators.estimate import GAUSSIAN_MISFIT, NOT_CONVERGED, TOO_FEW
from ib_analysis.estimators.gaussian import bias_nats, information_bits, total_correlation_or_nan_bits
from ib_analysis.estimators.known_information import KNOWN_TASKS, dense, multinormal, normal, sparse

pytestmark = pytest.mark.slow  # many draws

MULTINORMAL = [
    "1v1 normal 0.75",
    "multinormal sparse 5x5",
    "multinormal sparse 25x25",
    "multinormal dense 25x25",
    "multinormal dense 50x50",
]
ADDITIVE, ROLL = "1v1 additive uniform 0.1", "swiss roll 2x1"
HALF_CUBE = "half-cube of multinormal sparse 25x25"
SPIRAL, ASINH = "spiral of multinormal sparse 3x3", "asinh of student 5x5 df=2"

# What others measured (nats, mean of 3 seeds), off the truth because the model is wrong.
GAUSSIAN_OFF = {ADDITIVE: 1.627, ROLL: 0.020, HALF_CUBE: 0.961, SPIRAL: 0.237, ASINH: 0.002}
COPULA_OFF = {ADDITIVE: 1.276, ROLL: 0.031, SPIRAL: 0.238, ASINH: 0.001}


@pytest.fixture(scope="module")
def gaussian(draws):
    return {name: Gaussian().estimate(*draws(name, 10_000, 3)) for name in [*MULTINORMAL, *GAUSSIAN_OFF]}


@pytest.fixture(scope="module")
def copula(draws):
    return {name: CopulaGaussian().estimate(*draws(name, 10_000, 3)) for name in [*MULTINORMAL, *COPULA_OFF]}


@pytest.mark.parametrize("name", MULTINORMAL)
def test_both_are_right_on_multinormals(name, gaussian, copula):
    for estimate in (gaussian[name], copula[name]):
        assert estimate.bits.mean() * log(2) == pytest.approx(KNOWN_TASKS[name].information_bits * log(2), abs=0.02)
        assert not estimate.flags


@pytest.mark.parametrize("name", GAUSSIAN_OFF)
def test_gaussian_is_off_where_others_found_it_off(name, gaussian):
    assert gaussian[name].bits.mean() * log(2) == pytest.approx(GAUSSIAN_OFF[name], abs=0.025)


@pytest.mark.parametrize("name", COPULA_OFF)
def test_copula_is_off_where_others_found_it_off(name, copula):
    assert copula[name].bits.mean() * log(2) == pytest.approx(COPULA_OFF[name], abs=0.025)


@pytest.mark.parametrize("name", [ADDITIVE, ROLL, SPIRAL, ASINH])
def test_misfit_is_flagged_by_both(name, gaussian, copula):
    assert gaussian[name].flags[GAUSSIAN_MISFIT].all()
    assert copula[name].flags[GAUSSIAN_MISFIT].all()


def test_copula_undoes_the_half_cube():
    task = KNOWN_TASKS[HALF_CUBE]
    estimates = [CopulaGaussian().estimate(*task.sample(10_000, np.random.default_rng(seed))) for seed in range(12)]
    assert np.mean([estimate.bits for estimate in estimates]) * log(2) == pytest.approx(1.0217, abs=0.01)
    assert not any(GAUSSIAN_MISFIT in estimate.flags for estimate in estimates)


@pytest.fixture(scope="module")
def wide():
    """30 draws of 64 pairs of correlation .9, 1,000 samples each: 53.143 nats, as many dimensions as a head."""
    pairs = [sparse(64, 0.9, pairs=64).sample(1000, np.random.default_rng(seed)) for seed in range(30)]
    return np.stack([x for x, _ in pairs]), np.stack([y for _, y in pairs])


def test_correction_removes_the_bias_of_many_dimensions(wide):
    estimate = Gaussian().estimate(*wide)
    corrected = estimate.bits.mean() * log(2)
    assert corrected == pytest.approx(53.143, abs=0.12)
    assert corrected + bias_nats(64, 64, 1000) == pytest.approx(55.333, abs=0.12)  # uncorrected
    assert list(estimate.flags) == [TOO_FEW]  # 1,000 samples, 128 dimensions


@pytest.mark.parametrize("task", [normal(), sparse(5), sparse(25), dense(25), dense(50)], ids=lambda task: task.name)
def test_interval_contains_the_truth_as_often_as_it_says(task):
    hits = 0
    for start in range(0, 100, 10):  # ten at a time, to save memory
        pairs = [task.sample(4000, np.random.default_rng(seed)) for seed in range(start, start + 10)]
        low, high = Gaussian().estimate(np.stack([x for x, _ in pairs]), np.stack([y for _, y in pairs])).interval
        hits += int(((low <= task.information_bits) & (task.information_bits <= high)).sum())
    assert 90 <= hits <= 99


@pytest.mark.parametrize("dim", [1, 5, 25])
@pytest.mark.parametrize("method", [Gaussian(), CopulaGaussian()], ids=lambda method: method.name)
def test_shuffled_pairs_share_nothing(dim, method):
    rng = np.random.default_rng(dim)
    x, y = sparse(dim, pairs=1).sample(100 * 1000, rng)
    x, y = x.reshape(100, 1000, dim), rng.permutation(y).reshape(100, 1000, dim)
    estimate = method.estimate(x, y)
    assert abs(estimate.bits.mean()) < 4 * estimate.bits.std() / 10
    low, high = estimate.interval
    assert ((low <= 0) & (high >= 0)).mean() >= 0.93


def test_documents_widen_the_interval():
    rng = np.random.default_rng(0)
    x, y = sparse(3).sample(400, rng)
    tokens, documents = np.repeat(np.arange(400), 25), np.repeat(np.arange(400), 25)  # each sample 25 times
    x, y = x[tokens], y[tokens]
    low, high = Gaussian().estimate(x, y).interval
    clustered_low, clustered_high = Gaussian().estimate(x, y, documents).interval
    once_low, once_high = Gaussian().estimate(x[::25], y[::25]).interval
    assert clustered_high - clustered_low == pytest.approx(once_high - once_low, rel=0.15)
    assert clustered_high - clustered_low == pytest.approx(5 * (high - low), rel=0.15)


def test_documents_may_have_any_names_and_order():
    x, y = sparse(3).sample(1000, np.random.default_rng(0))
    numbers = np.arange(1000) // 10
    names = np.array([f"document {number:03}" for number in numbers])
    expected = Gaussian().estimate(x, y, numbers)
    for same in (Gaussian().estimate(x, y, names), Gaussian().estimate(torch.tensor(x), torch.tensor(y), torch.tensor(numbers))):
        assert same.interval == expected.interval


def test_few_documents_are_flagged():
    x, y = sparse(3).sample(1000, np.random.default_rng(0))
    assert TOO_FEW in Gaussian().estimate(x, y, np.arange(1000) % 9).flags
    assert TOO_FEW not in Gaussian().estimate(x, y, np.arange(1000) % 10).flags


def test_few_samples_are_flagged():
    x, y = sparse(5).sample(100, np.random.default_rng(0))
    assert TOO_FEW in Gaussian().estimate(x[:99], y[:99]).flags
    assert TOO_FEW not in Gaussian().estimate(x, y).flags


def test_correlation_without_a_variance_does_not_settle(draws):
    assert NOT_CONVERGED in Gaussian().estimate(*draws("student 5x5 df=2", 10_000, 3)).flags


def dense_covariance(rng, dim):
    factor = rng.standard_normal((dim, 4 * dim))  # well conditioned: rounding grows with the condition
    return factor @ factor.T


matrices = st.integers(0, 2**31).map(np.random.default_rng)


@given(rng=matrices, dim_x=st.integers(1, 6), dim_y=st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_linear_maps_change_nothing(rng, dim_x, dim_y):
    z = rng.standard_normal((200, dim_x + dim_y)) @ np.linalg.cholesky(dense_covariance(rng, dim_x + dim_y)).T
    x, y = z[:, :dim_x], z[:, dim_x:]
    map_x, map_y = (np.linalg.cholesky(dense_covariance(rng, dim)) for dim in (dim_x, dim_y))
    expected = Gaussian().estimate(x, y)
    mapped = Gaussian().estimate(x @ map_x + 3, 1e4 * (y @ map_y))
    assert mapped.bits == pytest.approx(expected.bits, abs=1e-8)
    assert np.array(mapped.interval) == pytest.approx(np.array(expected.interval), abs=1e-8)


@given(rng=matrices, dims=st.tuples(*[st.integers(1, 4)] * 4))
@settings(deadline=None, max_examples=40)
def test_independent_blocks_add_up(rng, dims):
    """I of a block-diagonal covariance is the sum of the blocks' I; at a count where the bias vanishes."""
    dim_x, dim_y, other_x, other_y = dims
    first, second = dense_covariance(rng, dim_x + dim_y), dense_covariance(rng, other_x + other_y)
    both = np.zeros((sum(dims), sum(dims)))
    order = [*range(dim_x), *range(dim_x + other_x, dim_x + other_x + dim_y)]
    rest = [index for index in range(sum(dims)) if index not in order]
    both[np.ix_(order, order)], both[np.ix_(rest, rest)] = first, second
    count = 10**12
    parts = [information_bits(torch.tensor(block), dim, count) for block, dim in ((first, dim_x), (second, other_x))]
    assert float(information_bits(torch.tensor(both), dim_x + other_x, count)) == pytest.approx(float(sum(parts)), abs=1e-8)


@given(rng=matrices, dim_x=st.integers(1, 4), dim_y=st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_covariance_gives_the_difference_of_entropies(rng, dim_x, dim_y):
    covariance = dense_covariance(rng, dim_x + dim_y)
    blocks = covariance[:dim_x, :dim_x], covariance[dim_x:, dim_x:], covariance
    h_x, h_y, h_both = (multivariate_normal(cov=block).entropy() for block in blocks)
    bits = float(information_bits(torch.tensor(covariance), dim_x, 10**12))
    assert bits == pytest.approx((h_x + h_y - h_both) / log(2), abs=1e-8)


@given(rng=matrices)
@settings(deadline=None, max_examples=30)
def test_quantizing_twice_keeps_less(rng):
    """X - 4 bit - 2 bit, nested cells: what a finer code holds of x, no coarser one can exceed."""
    x = rng.standard_normal((2000, 3)) @ np.linalg.cholesky(dense_covariance(rng, 3)).T
    x = x / x.std(0)
    fine = np.clip(np.floor(x / 0.5), -8, 7)
    coarse = np.clip(np.floor(fine / 4), -2, 1)
    for method in (Gaussian(), CopulaGaussian()):
        assert method.estimate(x, fine).bits > method.estimate(x, coarse).bits


def test_heads_in_a_batch_are_estimated_alone():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3, 500, 4)), rng.standard_normal((2, 3, 500, 2))
    y[0, 1] += x[0, 1, :, :2]
    x[1, 2] = rng.standard_t(2, (500, 4))
    for method in (Gaussian(), CopulaGaussian()):
        batch = method.estimate(x, y)
        assert batch.bits.shape == (2, 3)
        for head in np.ndindex(2, 3):
            alone = method.estimate(x[head], y[head])
            assert alone.bits == pytest.approx(batch.bits[head], abs=1e-10)
            assert alone.interval == pytest.approx([end[head] for end in batch.interval], abs=1e-10)
            assert set(alone.flags) == {name for name, mask in batch.flags.items() if mask[head]}


def test_total_correlation_of_a_chain():
    z = np.random.default_rng(0).standard_normal((400, 500, 32)) @ np.linalg.cholesky(chain(32)).T
    bits = total_correlation_or_nan_bits(torch.stack([head.mT.cov() for head in torch.tensor(z)]), 500)
    assert bits.mean() * log(2) == pytest.approx(-31 / 2 * log(1 - 0.81), abs=0.08)


def chain(dim):
    return 0.9 ** np.abs(np.subtract.outer(np.arange(dim), np.arange(dim)))


def test_normal_scores_share_the_rank_of_equal_values():
    scores = normal_scores(torch.tensor([[5.0], [1.0], [5.0], [9.0]]))[:, 0]
    assert scores[0] == scores[2] == pytest.approx(0.0)
    assert -scores[1] == pytest.approx(float(scores[3])) == pytest.approx(0.8416, abs=1e-4)


@pytest.mark.parametrize("method", [Gaussian(), CopulaGaussian()], ids=lambda method: method.name)
def test_singular_covariances_are_refused(method):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((100, 3)), rng.standard_normal((100, 2))
    with pytest.raises(EstimatorError, match="100 samples of 150 dimensions"):
        method.estimate(rng.standard_normal((100, 75)), rng.standard_normal((100, 75)))
    with pytest.raises(EstimatorError, match=r"x.*redundant: drop column 3"):
        method.estimate(np.concatenate([x, x[:, :1]], axis=1), y)
    with pytest.raises(EstimatorError, match=r"y.*redundant: drop column 2"):
        method.estimate(x, np.concatenate([y, y[:, :1]], axis=1))
    with pytest.raises(EstimatorError, match="infinite"):
        method.estimate(x, np.concatenate([y, 2 * x[:, :1]], axis=1))


def test_refusal_names_the_head():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3, 100, 2)), rng.standard_normal((2, 3, 100, 2))
    y[1, 2] = x[1, 2]
    with pytest.raises(EstimatorError, match=r"head \[1, 2\]"):
        Gaussian().estimate(x, y)


def test_single_precision_input_is_computed_in_double():
    x, y = multinormal("", chain(4), 2).sample(1000, np.random.default_rng(0))
    half = Gaussian().estimate(torch.tensor(x, dtype=torch.bfloat16), torch.tensor(y, dtype=torch.bfloat16))
    assert half.bits.dtype == np.float64
    assert half.bits == pytest.approx(Gaussian().estimate(x, y).bits, abs=0.02)
