"""Information of tasks that are hard is right: by their log density ratio, and once more by quadrature."""

from math import log

import numpy as np
import pytest

from ib_analysis.estimators.hard_tasks import HELD_BACK, SEEN
from ib_analysis.estimators.known_densities import (
    cells,
    channel,
    correlated_student,
    counts,
    embedded,
    erased,
    labels,
    normals,
    ring,
)
from ib_analysis.estimators.known_information import KNOWN_TASKS, normal, student

TASKS = {**SEEN, **HELD_BACK}


def log_ratio(task, count, rng, shuffle=False):
    """Log density ratios of drawn pairs, or of independent ones."""
    x, y = task.sample(count, rng)
    return task.log_ratio(x, rng.permutation(y) if shuffle else y)


WITH_RATIO = [name for name, task in TASKS.items() if task.log_ratio is not None]


def test_no_task_is_in_both_halves_or_among_those_of_others():
    assert len(TASKS) == len(SEEN) + len(HELD_BACK) >= 48
    assert not {*TASKS} & {*KNOWN_TASKS}


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_reproducible_pairs(name):
    x, y = TASKS[name].sample(100, np.random.default_rng(3))
    again_x, again_y = TASKS[name].sample(100, np.random.default_rng(3))
    assert x.ndim == y.ndim == 2 and len(x) == len(y) == 100
    assert np.array_equal(x, again_x) and np.array_equal(y, again_y)
    assert np.isfinite(x).all() and np.isfinite(y).all()


@pytest.mark.parametrize("name", WITH_RATIO)
def test_information_is_the_mean_log_ratio(name):
    task = TASKS[name]
    bits = log_ratio(task, 20_000, np.random.default_rng(0)) / log(2)
    assert bits.mean() == pytest.approx(task.information_bits, abs=4 * bits.std() / 20_000**0.5 + 1e-3)


@pytest.mark.parametrize("name", WITH_RATIO)
def test_the_mean_ratio_of_independent_pairs_is_one(name):
    """So log_ratio is the log of a density ratio, up to samples of large ratio that are not drawn."""
    ratio = np.exp(log_ratio(TASKS[name], 20_000, np.random.default_rng(0), shuffle=True))
    assert ratio.mean() == pytest.approx(1, abs=5 * ratio.std() / 20_000**0.5 + 1e-3)


@pytest.mark.parametrize("name", ["eight normals on a ring", "cross of two correlations", "three of other slopes"])
def test_mixtures_by_quadrature(name):
    """The sum of p(x) p(y) r log r on a grid, the margins being those of many samples."""
    task = TASKS[name]
    grid = np.linspace(-8, 8, 401)
    x, y = (side.reshape(-1, 1) for side in np.meshgrid(grid, grid, indexing="ij"))
    assert task.log_ratio is not None
    ratio = np.exp(task.log_ratio(x, y)).reshape(401, 401)
    drawn = task.sample(400_000, np.random.default_rng(5))
    at = [np.histogram(values, bins=401, range=(-8.02, 8.02))[0] / 400_000 for values in drawn]
    joint = ratio * at[0][:, None] * at[1]
    assert joint.sum() == pytest.approx(1, abs=0.01)
    assert np.sum(joint * np.log2(ratio)) == pytest.approx(task.information_bits, abs=0.02)


def test_correlated_student_without_correlation():
    assert correlated_student("", 3, 4, 0.0).information_bits == pytest.approx(student(3, 4).information_bits)


def test_cells_and_rings_have_the_logarithm_of_their_share():
    assert cells("", ("##", "##")).information_bits == pytest.approx(0)
    assert cells("", ("#.", ".#")).information_bits == pytest.approx(1)
    assert ring("", 0.125).information_bits == pytest.approx(3)
    x, y = ring("", 0.25, turns=3).sample(2000, np.random.default_rng(0))
    assert (((y - 3 * x) % 1) < 0.25 + 1e-12).all()


def test_a_channel_of_little_noise_holds_more():
    few, many = channel("", np.abs, lambda x: np.full_like(x, 0.5)), channel("", np.abs, lambda x: np.full_like(x, 0.1))
    assert 0 < few.information_bits < many.information_bits
    assert channel("", lambda x: 0 * x, np.ones_like).information_bits == pytest.approx(0, abs=1e-6)


def test_counts_of_a_constant_rate_say_nothing():
    assert counts("", lambda x: np.full_like(x, 3.0)).information_bits == pytest.approx(0, abs=1e-9)


def test_labels_of_lumps_far_apart_hold_their_entropy():
    task = labels("", 2.0, np.array([[0.0], [100.0], [200.0], [300.0]]), np.eye(1), (0, 1, 2, 3))
    assert log_ratio(task, 1000, np.random.default_rng(0)) / log(2) == pytest.approx(np.full(1000, 2.0), abs=1e-6)


def test_one_normal_is_no_mixture():
    covariance = np.array([[1.0, 0.75], [0.75, 1.0]])
    task = normals("", 0.0, 1, np.zeros((1, 2)), covariance)
    bits = log_ratio(task, 100_000, np.random.default_rng(0)) / log(2)
    assert bits.mean() == pytest.approx(normal(0.75).information_bits, abs=0.01)


def test_erasing_keeps_the_rest_and_turning_keeps_lengths():
    x, y = erased("", normal(0.9), 0.4).sample(10_000, np.random.default_rng(0))
    assert np.mean(y == 0) == pytest.approx(0.4, abs=0.02)
    assert np.corrcoef(x[y != 0], y[y != 0])[0, 1] == pytest.approx(0.9, abs=0.01)
    base = normal(0.9)
    task = embedded("", base, 2, 3)
    x, y = task.sample(5000, np.random.default_rng(0))
    assert x.shape[1] == 3 and y.shape[1] == 4
    values = np.linalg.svd(np.corrcoef(x.T, y.T)[:3, 3:])[1]
    assert values[0] == pytest.approx(0.9, abs=0.02) and values[1] < 0.1
