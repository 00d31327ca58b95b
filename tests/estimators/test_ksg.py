"""Nearest-neighbour estimates against the table of others, a plain twin, and their limits."""

from math import log

import numpy as np
import pytest
import torch
from scipy.special import digamma

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators import KSG
from ib_analysis.estimators.estimate import CONTRADICTED, NOT_CONVERGED, ONE_SIDED, SATURATED
from ib_analysis.estimators.known_information import KNOWN_TASKS, normal, quantized_gaussian, sparse
from ib_analysis.estimators.ksg import information_nats
from ib_analysis.estimators.samples import standardized

pytestmark = pytest.mark.slow

TABLE = {  # nats, N = 10,000, k = 10, mean of 3 seeds
    "1v1 normal 0.75": 0.417,
    "1v1 additive uniform 0.1": 1.678,
    "swiss roll 2x1": 0.418,
    "multinormal sparse 5x5": 0.741,
    "multinormal sparse 25x25": 0.190,
    "multinormal dense 25x25": 1.064,
    "multinormal dense 50x50": 1.261,
    "half-cube of multinormal sparse 25x25": 0.164,
    "spiral of multinormal sparse 3x3": 0.717,
    "asinh of student 5x5 df=2": 0.237,
}


@pytest.mark.parametrize("name", TABLE)
def test_agrees_with_what_others_measured(name, draws):
    pairs = zip(*(standardized(torch.tensor(values)) for values in draws(name, 10_000, 3)))
    nats = np.mean([information_nats(x, y, 10) for x, y in pairs])
    assert nats == pytest.approx(TABLE[name], abs=0.03)


def plain_nats(x, y, neighbours):
    """Equation 8, word by word."""
    distance_x = np.linalg.norm(x[:, None] - x, axis=2)
    distance_y = np.linalg.norm(y[:, None] - y, axis=2)
    total = 0.0
    for i in range(len(x)):
        both = np.maximum(distance_x[i], distance_y[i])
        radius = np.sort(np.delete(both, i))[neighbours - 1]
        n_x = np.sum(np.delete(distance_x[i], i) < radius)
        n_y = np.sum(np.delete(distance_y[i], i) < radius)
        total += digamma(n_x + 1) + digamma(n_y + 1)
    return digamma(neighbours) + digamma(len(x)) - total / len(x)


@pytest.mark.parametrize("neighbours", [1, 3, 10])
@pytest.mark.parametrize(("dim_x", "dim_y"), [(1, 1), (1, 3), (3, 3), (5, 2)])
def test_equals_its_definition(dim_x, dim_y, neighbours):
    x, y = sparse(5).sample(203, np.random.default_rng(dim_x))  # 203 rows do not fill the last block
    x, y = x[:, :dim_x], y[:, :dim_y]
    expected = plain_nats(x, y, neighbours)
    assert information_nats(torch.tensor(x), torch.tensor(y), neighbours) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dim", [1, 2])
def test_interval_contains_the_truth(dim):
    """Where the method is nearly unbiased. 40 draws: at 95%, fewer than 34 hits have probability 0.3%."""
    task = sparse(dim, correlation=0.5, pairs=1)
    pairs = [task.sample(1000, np.random.default_rng(seed)) for seed in range(40)]
    low, high = KSG().estimate(np.stack([x for x, _ in pairs]), np.stack([y for _, y in pairs])).interval
    assert ((low <= task.information_bits) & (task.information_bits <= high)).sum() >= 34


def test_shuffled_pairs_share_nothing():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 1000, 2)), rng.standard_normal((40, 1000, 1))
    estimate = KSG().estimate(x, y)
    low, high = estimate.interval
    assert ((low <= 0) & (high >= 0)).sum() >= 34
    assert abs(estimate.bits.mean()) < 4 * estimate.bits.std() / 40**0.5


def test_saturation_is_flagged_at_a_head():
    """64 channels at 4 bit hold 106.8 nats; no method of neighbours sees more than log N - psi(k)."""
    x, y = KNOWN_TASKS["quantized gaussian 64x64 4 bit"].sample(10_000, np.random.default_rng(0))
    estimate = KSG().estimate(x, y)
    assert estimate.bits * log(2) < log(10_000) - digamma(10)
    assert {SATURATED, NOT_CONVERGED} <= set(estimate.flags)


def test_no_flag_where_it_is_right():
    x, y = normal().sample(4000, np.random.default_rng(0))
    assert not KSG().estimate(x, y).flags


def test_drift_is_flagged():
    x, y = sparse(5).sample(4000, np.random.default_rng(0))
    assert set(KSG().estimate(x, y).flags) == {NOT_CONVERGED, CONTRADICTED}


def test_documents_widen_the_interval():
    x, y = normal().sample(200, np.random.default_rng(0))
    near = 1e-3 * np.random.default_rng(1).standard_normal((2, 5000, 1))
    tokens = np.repeat(np.arange(200), 25)  # 25 almost equal samples a document
    documents = KSG(neighbours=30).estimate(x[tokens] + near[0], y[tokens] + near[1], tokens).interval
    samples = KSG(neighbours=30).estimate(x[tokens] + near[0], y[tokens] + near[1]).interval
    assert documents[1] - documents[0] > 2 * (samples[1] - samples[0])


def test_heads_in_a_batch_are_estimated_alone():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 2, 300, 3)), rng.standard_normal((2, 2, 300, 1))
    y[0, 1] += x[0, 1, :, :1]
    batch = KSG().estimate(x, torch.tensor(y))
    for head in np.ndindex(2, 2):
        alone = KSG().estimate(x[head], y[head])
        assert alone.bits == batch.bits[head]
        assert alone.interval == tuple(end[head] for end in batch.interval)


def test_quantizing_twice_keeps_less():
    x, fine = quantized_gaussian(2, bits=4, step=0.3352).sample(4000, np.random.default_rng(0))
    coarse = np.floor(fine / 0.3352 / 4)
    assert KSG().estimate(x, fine).bits > KSG().estimate(x, coarse).bits


def test_equal_samples_are_refused():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (1000, 2)).astype(float)
    for x, y in ((codes, codes), (codes[:, :1], codes[:, 1:])):
        with pytest.raises(EstimatorError, match="more than 10 samples are equal"):
            KSG().estimate(x, y)


def test_too_few_for_an_interval_are_refused():
    x, y = normal().sample(100, np.random.default_rng(0))
    with pytest.raises(EstimatorError, match="80 samples are too few"):
        KSG().estimate(x[:80], y[:80])
    with pytest.raises(EstimatorError, match="7 documents are too few"):
        KSG().estimate(x, y, np.arange(100) % 7)


@pytest.mark.parametrize("neighbours", [0, -1, 1.5, float("nan"), "3"])
def test_neighbours_that_cannot_be_counted_are_refused(neighbours):
    with pytest.raises(EstimatorError, match="whole number, at least 1"):
        KSG(neighbours=neighbours)


@pytest.mark.parametrize("dim", [8, 32, 128])
def test_a_side_of_many_dimensions_hides_one_of_few(dim):
    """3.3 bits of information, an estimate near 0 with an interval of no width: it says so."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((1000, dim))
    assert ONE_SIDED in KSG().estimate(x, x[:, :1] + 0.1 * generator.standard_normal((1000, 1))).flags
    both = KSG().estimate(x, 0.5 * x + generator.standard_normal((1000, dim)))
    assert ONE_SIDED not in both.flags


def test_a_far_outlier_hides_its_side():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((1000, 1))
    y = 0.9 * x + 0.19**0.5 * generator.standard_normal((1000, 1))
    assert ONE_SIDED not in KSG().estimate(x, y).flags
    x[0] = 1e6
    assert ONE_SIDED in KSG().estimate(x, y).flags


def test_a_label_hides_behind_a_latent_of_many_dimensions():
    generator = np.random.default_rng(0)
    label = generator.integers(0, 2, 1000)
    x = generator.standard_normal((1000, 100))
    x[:, 0] += 2 * label
    assert ONE_SIDED in KSG().estimate(x, label[:, None].astype(float)).flags
