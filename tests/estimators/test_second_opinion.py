"""An estimate is contradicted where it is too low, and only there."""

import numpy as np
import pytest
import torch

from ib_analysis.estimators import KSG
from ib_analysis.estimators.estimate import CONTRADICTED, NOT_CONVERGED, ONE_SIDED
from ib_analysis.estimators.hard_tasks import SEEN
from ib_analysis.estimators.known_information import KNOWN_TASKS
from ib_analysis.estimators.samples import check_samples
from ib_analysis.estimators.second_opinion import contradicted


def by(task, bits, others=None):
    x, y = task.sample(3000, np.random.default_rng(0))
    samples = check_samples(x, y, None)
    given = None if others is None else torch.tensor(others, dtype=torch.float64)
    return bool(contradicted(samples, torch.tensor(bits, dtype=torch.float64), given))


@pytest.mark.parametrize("name", [*SEEN, *(name for name in KNOWN_TASKS if "quantized" not in name)])
def test_the_truth_is_not_contradicted(name):
    task = SEEN.get(name) or KNOWN_TASKS[name]
    assert not by(task, task.information_bits)


@pytest.mark.parametrize("name", ["multinormal sparse 25x25", "multinormal dense 50x50", "half-cube of multinormal sparse 25x25"])
def test_the_gaussian_bound_sees_many_dimensions(name):
    assert by(KNOWN_TASKS[name], 0.8 * KNOWN_TASKS[name].information_bits)


@pytest.mark.parametrize("name", ["board of 4", "student 5x5 df=2", "label against 20", "parity of two signs"])
def test_views_see_what_is_not_linear(name):
    assert by(SEEN.get(name) or KNOWN_TASKS[name], 0.4 * (SEEN.get(name) or KNOWN_TASKS[name]).information_bits)


def test_less_than_nothing_is_contradicted():
    assert by(SEEN["independent 8x8"], -0.2)
    assert not by(SEEN["independent 8x8"], -0.01)


def test_what_others_hold_counts():
    assert by(SEEN["independent 8x8"], 0.0, others=0.2)
    assert not by(SEEN["independent 8x8"], 0.0, others=0.05)


def test_neighbours_misled_by_heavy_tails_are_contradicted():
    x, y = SEEN["student 3x3 df=2"].sample(3000, np.random.default_rng(0))
    assert CONTRADICTED in KSG().estimate(x, y).flags


def test_neighbours_of_labels_are_right_and_say_so():
    x, y = SEEN["label of alternating lumps"].sample(3000, np.random.default_rng(0))
    estimate = KSG().estimate(x, y)
    assert estimate.bits == pytest.approx(SEEN["label of alternating lumps"].information_bits, abs=0.06)
    assert not {ONE_SIDED, CONTRADICTED, NOT_CONVERGED} & {*estimate.flags}
