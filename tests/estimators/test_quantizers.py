"""Tables of scalar quantizers, to the digits that others print."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from ib_analysis.estimators.quantizers import dithered_bits, lloyd_max, optimal_uniform, uniform


@pytest.mark.parametrize(("bits", "distortion", "entropy"), [(2, 0.11748, 1.911), (3, 0.03455, 2.825), (4, 0.00950, 3.765)])
def test_lloyd_and_max(bits, distortion, entropy):
    assert lloyd_max(bits).distortion == pytest.approx(distortion, abs=5e-6)
    assert lloyd_max(bits).entropy_bits == pytest.approx(entropy, abs=5e-4)


@pytest.mark.parametrize(("bits", "distortion", "entropy"), [(2, 0.11885, 1.904), (3, 0.03744, 2.761), (4, 0.01154, 3.602)])
def test_optimal_uniform(bits, distortion, entropy):
    assert optimal_uniform(bits).distortion == pytest.approx(distortion, abs=5e-6)
    assert optimal_uniform(bits).entropy_bits == pytest.approx(entropy, abs=5e-4)


def test_one_bit():
    assert lloyd_max(1).distortion == pytest.approx(1 - 2 / np.pi)
    assert lloyd_max(1).levels == pytest.approx([-np.sqrt(2 / np.pi), np.sqrt(2 / np.pi)])
    assert lloyd_max(1).entropy_bits == pytest.approx(1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_levels_are_the_means_of_their_cells(bits):
    table = lloyd_max(bits)
    assert table.thresholds == pytest.approx((table.levels[1:] + table.levels[:-1]) / 2)
    assert table.distortion == pytest.approx(1 - table.levels**2 @ table.probabilities, rel=1e-3)
    assert table.distortion < optimal_uniform(bits).distortion


def test_measured_on_samples():
    x = np.random.default_rng(0).standard_normal(1_000_000)
    table = uniform(3, 0.7)
    cell = np.digitize(x, table.thresholds)
    assert np.mean((x - table.levels[cell]) ** 2) == pytest.approx(table.distortion, rel=0.01)
    assert np.bincount(cell) / len(x) == pytest.approx(table.probabilities, abs=2e-3)


def test_other_steps_are_worse():
    found = minimize_scalar(lambda step: uniform(4, step).distortion, bracket=(0.2, 0.5))
    assert optimal_uniform(4).distortion == pytest.approx(found.fun, rel=1e-9)


@pytest.mark.parametrize(("step", "bits"), [(2, 1.2544), (1, 2.1048), (0.5, 3.0620), (0.25, 4.0508)])
def test_dithered(step, bits):
    assert dithered_bits(step) == pytest.approx(bits, abs=5e-5)


@pytest.mark.parametrize("step", [4.0, 1.0, 0.01])
def test_dither_lies_between_its_bounds(step):
    gaussian = np.log2(1 + 12 / step**2) / 2
    assert gaussian < dithered_bits(step) < gaussian + 0.2547
