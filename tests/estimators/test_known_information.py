"""Known information is right, and the samplers draw what it is known of."""

from math import log

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import kstest, norm, t

from ib_analysis.estimators.known_information import (
    KNOWN_TASKS,
    additive_uniform,
    asinh,
    dense,
    half_cube,
    normal,
    quantized_gaussian,
    sparse,
    spiral,
    student,
    swiss_roll,
)

GOLDEN = {  # nats
    "1v1 normal 0.75": 0.4133,
    "1v1 additive uniform 0.1": 1.7094,
    "swiss roll 2x1": 0.4133,
    "multinormal sparse 5x5": 1.0217,
    "multinormal sparse 25x25": 1.0217,
    "multinormal dense 25x25": 1.2922,
    "multinormal dense 50x50": 1.6243,
    "half-cube of multinormal sparse 25x25": 1.0217,
    "spiral of multinormal sparse 3x3": 1.0217,
    "asinh of student 5x5 df=2": 0.4482,
}


@pytest.mark.parametrize("name", GOLDEN)
def test_information(name):
    assert KNOWN_TASKS[name].information_bits * log(2) == pytest.approx(GOLDEN[name], abs=5e-5)


@pytest.mark.parametrize("name", KNOWN_TASKS)
def test_samples_are_reproducible_pairs(name):
    x, y = KNOWN_TASKS[name].sample(100, np.random.default_rng(3))
    again_x, again_y = KNOWN_TASKS[name].sample(100, np.random.default_rng(3))
    assert x.ndim == y.ndim == 2 and len(x) == len(y) == 100
    assert np.array_equal(x, again_x) and np.array_equal(y, again_y)
    assert np.isfinite(x).all() and np.isfinite(y).all()


@pytest.mark.parametrize("task", [normal(0.6), sparse(4), dense(3)], ids=lambda task: task.name)
def test_multinormals_have_unit_variance_and_the_information_of_their_correlation(task):
    z = np.concatenate(task.sample(400_000, np.random.default_rng(0)), axis=1)
    covariance = np.cov(z.T)
    assert covariance.diagonal() == pytest.approx(1, abs=0.02)
    dim = len(covariance) // 2
    blocks = covariance[:dim, :dim], covariance[dim:, dim:], covariance
    log_x, log_y, log_both = (np.linalg.slogdet(block)[1] for block in blocks)
    assert (log_x + log_y - log_both) / 2 / log(2) == pytest.approx(task.information_bits, abs=0.02)


@pytest.mark.parametrize("noise", [0.1, 0.5, 0.75])
def test_additive_noise_by_quadrature(noise):
    """I = h(Y) - h(N) with Y the sum of two uniform variables."""

    def surprise(y):
        density = max(0.0, min(1.0, y + noise) - max(0.0, y - noise)) / (2 * noise)
        return -density * np.log(density) if density > 0 else 0.0

    corners = sorted({-noise, noise, 1 - noise, 1 + noise})
    entropy = sum(quad(surprise, a, b)[0] for a, b in zip(corners, corners[1:]))
    assert (entropy - log(2 * noise)) / log(2) == pytest.approx(additive_uniform(noise).information_bits, abs=1e-6)
    x, y = additive_uniform(noise).sample(10_000, np.random.default_rng(0))
    assert x.min() >= 0 and x.max() <= 1
    assert kstest(((y - x) / noise).ravel(), "uniform", (-1, 2)).pvalue > 1e-3


def test_student_margins_share_their_scale():
    x, y = student(3, 4).sample(50_000, np.random.default_rng(0))
    assert kstest(x[:, 1], t(4).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(x[:, 0], y[:, 0])[0, 1]) < 0.03
    assert np.corrcoef(np.abs(x[:, 0]), np.abs(y[:, 0]))[0, 1] > 0.15


def test_student_becomes_independent_with_many_degrees_of_freedom():
    assert student(5, 2).information_bits > student(5, 20).information_bits > student(5, 10_000).information_bits > 0
    assert student(5, 10_000).information_bits < 1e-3


def test_student_by_quadrature():
    """1v1, from the joint density t_2 and its margins."""
    freedom = 3.0

    def inner(x, y):
        joint = (1 + (x * x + y * y) / freedom) ** (-(freedom + 2) / 2) / (2 * np.pi)
        return joint * np.log2(joint / (t.pdf(x, freedom) * t.pdf(y, freedom)))

    grid = np.sinh(np.linspace(-9, 9, 2001))
    weight = np.gradient(grid)
    total = inner(grid[:, None], grid) * weight[:, None] * weight
    assert total.sum() == pytest.approx(student(1, 3).information_bits, abs=1e-4)


@pytest.mark.parametrize(
    "task", [swiss_roll(), spiral(sparse(3)), half_cube(sparse(3)), asinh(student(2, 3))], ids=lambda task: task.name
)
def test_maps_can_be_undone(task):
    """Distinct pairs stay distinct: no map merges samples, so no information is lost."""
    x, y = task.sample(2000, np.random.default_rng(0))
    assert len(np.unique(x, axis=0)) == len(np.unique(y, axis=0)) == 2000


def test_spirals_turn_without_stretching():
    base, task = sparse(3), spiral(sparse(3))
    (x, y), (turned_x, turned_y) = base.sample(500, np.random.default_rng(0)), task.sample(500, np.random.default_rng(0))
    assert np.linalg.norm(turned_x, axis=1) == pytest.approx(np.linalg.norm(x, axis=1))
    assert np.linalg.norm(turned_y, axis=1) == pytest.approx(np.linalg.norm(y, axis=1))
    assert np.array_equal(turned_x[:, 2], x[:, 2]) and np.array_equal(turned_y[:, 0], y[:, 0])
    angle = np.square(x).sum(1) / 3
    assert turned_x[:, 0] == pytest.approx(np.cos(angle) * x[:, 0] - np.sin(angle) * x[:, 1])


def test_swiss_roll_lies_on_its_curve():
    x, y = swiss_roll().sample(1000, np.random.default_rng(0))
    radius = 21 * np.linalg.norm(x, axis=1)
    assert radius.min() >= 1.5 * np.pi and radius.max() <= 4.5 * np.pi
    assert 21 * x[:, 0] == pytest.approx(radius * np.cos(radius))
    assert kstest(y.ravel(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("correlation", [1.0, 0.9, 0.5])
def test_quantized_gaussian_by_counting(correlation):
    """I(x; level) from a fine histogram of x, whose cells are small against the channel's noise."""
    task = quantized_gaussian(1, bits=2, step=0.9957, correlation=correlation)
    x, y = task.sample(2_000_000, np.random.default_rng(0))
    assert np.unique(y) == pytest.approx(0.9957 * np.array([-1.5, -0.5, 0.5, 1.5]))
    edges = np.union1d(norm.ppf(np.linspace(0, 1, 401)), [-0.9957, 0, 0.9957])
    cell, level = np.digitize(x[:, 0], edges), np.digitize(y[:, 0], [-0.9957, 0, 0.9957])
    joint = np.bincount(4 * cell + level).astype(float)
    joint = np.pad(joint, (0, -len(joint) % 4)).reshape(-1, 4) / len(x)
    expected = joint.sum(1, keepdims=True) * joint.sum(0)
    found = np.sum(joint[joint > 0] * np.log2(joint[joint > 0] / expected[joint > 0]))
    assert found == pytest.approx(task.information_bits, abs=0.002)


def test_no_channel_holds_more_than_its_code():
    clean, noisy = (quantized_gaussian(3, bits=4, step=0.3352, correlation=c).information_bits for c in (1.0, 0.9))
    assert noisy < clean == pytest.approx(3 * 3.602, abs=2e-3)
    assert noisy < 3 * normal(0.9).information_bits  # quantizing y loses something
