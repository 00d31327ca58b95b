"""What a Gaussian model leaves unexplained is found, and nothing where it is right."""

import numpy as np
import pytest
import torch

from ib_analysis.estimators import CopulaGaussian, Gaussian
from ib_analysis.estimators.estimate import GAUSSIAN_MISFIT
from ib_analysis.estimators.hard_tasks import SEEN
from ib_analysis.estimators.known_information import KNOWN_TASKS, quantized_gaussian
from ib_analysis.estimators.unexplained import is_unexplained, whitened


def unexplained(task, count=4000, heads=1):
    pairs = [task.sample(count, np.random.default_rng(seed)) for seed in range(heads)]
    x, y = (torch.tensor(np.stack(side)) for side in zip(*pairs))
    return is_unexplained(x, y, np.arange(count))


@pytest.mark.parametrize("name", ["1v1 normal 0.75", "multinormal sparse 5x5", "multinormal dense 25x25"])
def test_nothing_is_left_of_normal_variables(name):
    assert not unexplained(KNOWN_TASKS[name], heads=20).any()
    assert not unexplained(KNOWN_TASKS[name], count=700, heads=20).any()


@pytest.mark.parametrize(
    "name", ["letter Z", "board of 4", "parity of two signs", "cross of two correlations", "waves of 4 periods"]
)
def test_dependence_without_correlation_is_left(name):
    assert unexplained(SEEN[name]).all()


def test_a_rounded_copy_leaves_what_uniform_noise_says_more_than_normal_noise():
    """0.25 bits for a copy; next to nothing where noise was added before."""
    assert unexplained(quantized_gaussian(1, bits=4, step=0.3352)).all()
    assert not unexplained(quantized_gaussian(1, bits=4, step=0.3352, correlation=0.9)).any()


@pytest.mark.parametrize("name", ["letter Z", "board of 4", "parity of two signs"])
def test_copulas_of_normal_kurtosis_are_flagged(name):
    x, y = SEEN[name].sample(4000, np.random.default_rng(0))
    assert GAUSSIAN_MISFIT in CopulaGaussian().estimate(x, y).flags


def test_a_label_of_normal_kurtosis_is_flagged():
    x, y = SEEN["label of normal kurtosis"].sample(4000, np.random.default_rng(0))
    assert GAUSSIAN_MISFIT in Gaussian().estimate(x, y).flags


def test_only_the_head_that_misfits_is_flagged():
    (x, y), (u, v) = (task.sample(2000, np.random.default_rng(0)) for task in (KNOWN_TASKS["1v1 normal 0.75"], SEEN["letter Z"]))
    flags = CopulaGaussian().estimate(np.stack([x, u]), np.stack([y, v])).flags
    assert flags[GAUSSIAN_MISFIT].tolist() == [False, True]


def test_whitened_values_have_covariance_one_and_singular_ones_are_left():
    values = torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[1, :, 2] = values[1, :, 0]
    white = whitened(values)
    assert torch.allclose(white[0].mT @ white[0] / 500, torch.eye(3, dtype=torch.float64))
    assert white.isfinite().all()
