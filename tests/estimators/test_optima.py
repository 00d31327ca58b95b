"""Optima against golden numbers, and against each other where their sources meet."""

import re
from math import e, log, log2, pi
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ib_kernels.formats.rotated.reference import GAUSSIAN_STEP

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators.dithered_channel import SPACE_FILLING_BITS
from ib_analysis.estimators.optima import (
    canonical_correlations,
    gaussian_bottleneck,
    reverse_water_filling,
    shannon_lower_bound,
)
from ib_analysis.estimators.quantizers import dithered_bits, lloyd_max, optimal_uniform

CORRELATIONS = (0.9, 0.8, 0.5, 0.2)


@pytest.mark.parametrize(("beta", "rate", "relevance"), [(2, 1.0127, 0.6480), (4, 2.1113, 1.0535), (10, 3.7592, 1.3270)])
def test_gaussian_bottleneck_has_the_golden_values(beta, rate, relevance):
    i_x, i_y = gaussian_bottleneck(CORRELATIONS, beta)
    assert [i_x * log(2), i_y * log(2)] == pytest.approx([rate, relevance], abs=5e-5)


def test_gaussian_bottleneck_ends_at_all_information():
    i_x, i_y = gaussian_bottleneck(CORRELATIONS, [1.01, 1e9])
    assert i_y[1] * log(2) == pytest.approx(1.5054, abs=5e-5)
    assert i_x[0] == i_y[0] == 0  # below 1 / max rho^2 nothing is worth its rate


def test_gaussian_bottleneck_is_concave_with_slope_one_over_beta():
    beta = np.linspace(1.3, 40, 4000)
    i_x, i_y = gaussian_bottleneck(CORRELATIONS, beta)
    middle = (beta[1:] + beta[:-1]) / 2
    assert np.diff(i_y) / np.diff(i_x) == pytest.approx(1 / middle, rel=1e-3)


@given(st.lists(st.floats(0.05, 0.99), min_size=1, max_size=3), st.floats(1.1, 20), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_no_gaussian_channel_beats_the_bottleneck(correlations, beta, seed):
    """T = X + independent noise of any power in each canonical direction."""
    rho = np.array(correlations)
    noise = np.exp(np.random.default_rng(seed).normal(0, 2, len(rho)))
    rate = np.log2(1 + 1 / noise).sum() / 2
    relevance = -np.log2(1 - rho**2 / (1 + noise)).sum() / 2
    best_rate, best_relevance = gaussian_bottleneck(rho, beta)
    assert rate - beta * relevance >= best_rate - beta * best_relevance - 1e-9


def test_canonical_correlations_survive_linear_maps():
    rng = np.random.default_rng(0)
    covariance = np.eye(8)
    covariance[range(4), range(4, 8)] = covariance[range(4, 8), range(4)] = CORRELATIONS
    mixing = np.zeros((8, 8))
    mixing[:4, :4], mixing[4:, 4:] = rng.standard_normal((2, 4, 4))
    assert canonical_correlations(mixing @ covariance @ mixing.T, 4) == pytest.approx(CORRELATIONS, abs=1e-9)


def test_canonical_correlations_of_unequal_dimensions():
    covariance = np.full((5, 5), 0.5) + 0.5 * np.eye(5)
    found = canonical_correlations(covariance, 2)
    assert len(found) == 2 and found[1] == pytest.approx(0, abs=1e-9)
    information = -np.log2(1 - found**2).sum() / 2
    expected = np.log2(np.linalg.det(covariance[:2, :2]) * np.linalg.det(covariance[2:, 2:]) / np.linalg.det(covariance)) / 2
    assert information == pytest.approx(expected, abs=1e-9)


VARIANCES = (4, 2, 1, 0.5, 0.1)


@pytest.mark.parametrize(("distortion", "rate"), [(4, 1.2370), (2, 3.1480), (1, 5.3040), (0.5, 7.6439)])
def test_water_filling_has_the_golden_values(distortion, rate):
    assert reverse_water_filling(VARIANCES, distortion)[0] == pytest.approx(rate, abs=5e-5)


def test_water_level():
    assert reverse_water_filling(VARIANCES, 4)[1] == pytest.approx(1.2)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.floats(0.01, 1.2))
@settings(deadline=None)
def test_water_fills_to_the_distortion(variances, share):
    total = sum(variances)
    if total > 1e-6:
        rate, level = reverse_water_filling(variances, share * total)
        filled = np.minimum(variances, level)
        assert filled.sum() == pytest.approx(min(share, 1) * total)
        kept = np.array(variances) > level
        assert rate == pytest.approx(np.log2(np.array(variances)[kept] / level).sum() / 2, abs=1e-9)


def test_no_other_split_of_the_distortion_is_cheaper():
    rng = np.random.default_rng(0)
    rate, _ = reverse_water_filling(VARIANCES, 1.5)
    for share in rng.dirichlet(np.ones(5), 2000):
        assert np.log2(np.maximum(np.array(VARIANCES) / (1.5 * share), 1)).sum() / 2 >= rate


def test_shannon_bound_is_met_by_gaussians_and_crossed_by_none():
    variances = np.array([2.0, 3.0])
    entropy = np.log2(2 * pi * e * variances).sum() / 2
    assert shannon_lower_bound(entropy, 1.0, 2) == pytest.approx(reverse_water_filling(variances, 1.0)[0])
    for bits in (2, 3, 4):
        for table in (lloyd_max(bits), optimal_uniform(bits)):
            assert table.entropy_bits > shannon_lower_bound(log2(2 * pi * e) / 2, table.distortion)


@pytest.mark.parametrize(
    "call",
    [
        lambda: gaussian_bottleneck((1.0, 0.5), 2),
        lambda: gaussian_bottleneck((0.5,), 1),
        lambda: reverse_water_filling((1.0, -1.0), 0.5),
        lambda: gaussian_bottleneck((float("nan"), 0.5), 2),
        lambda: gaussian_bottleneck((0.5,), float("nan")),
        lambda: reverse_water_filling((1.0, 1.0), 0),
        lambda: reverse_water_filling((1.0, float("nan")), 0.5),
        lambda: reverse_water_filling((1.0, float("inf")), 0.5),
        lambda: reverse_water_filling((1.0, 1.0), float("nan")),
        lambda: reverse_water_filling((), 0.5),
        lambda: shannon_lower_bound(2.0, float("nan")),
        lambda: shannon_lower_bound(2.0, 0),
    ],
)
def test_what_has_no_optimum_is_refused(call):
    with pytest.raises(EstimatorError):
        call()


PAGE = (Path(__file__).parents[2] / "docs" / "optima.md").read_text(encoding="utf-8")


def test_the_table_of_the_page_is_what_the_functions_say():
    lines = [line for line in PAGE.splitlines() if re.match(r"\| (Lloyd-Max|optimal uniform) \|", line)]
    expected = []
    for name, quantizer in (("Lloyd-Max", lloyd_max), ("optimal uniform", optimal_uniform)):
        for bits in (2, 3, 4):
            error, entropy = quantizer(bits).distortion, quantizer(bits).entropy_bits
            least, _ = reverse_water_filling([1.0], error)
            assert shannon_lower_bound(log2(2 * pi * e) / 2, error) == pytest.approx(least)
            expected.append(f"| {name} | {bits} | {error:.5f} | {entropy:.3f} | {least:.3f} |")
    assert lines == expected


def test_the_dither_of_the_page_is_what_the_function_says():
    prose = " ".join(PAGE.split())
    said = re.search(r"Of width 2, 1, 0.5 and 0.25 deviations it carries ([\d., and]+) bits", prose)
    assert said is not None
    assert re.findall(r"\d\.\d+", said[1]) == [f"{dithered_bits(step):.4f}" for step in (2, 1, 0.5, 0.25)]
    assert f"at most {SPACE_FILLING_BITS:.4f} more than Gaussian noise" in prose


def test_the_bottleneck_of_the_page_is_what_the_function_says():
    lines = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, flags=re.MULTILINE)
    found = []
    for beta in (4 / 3, 2, 4, 16):
        rate, kept = gaussian_bottleneck([0.9], beta)
        found.append((f"{beta:.3g}", f"{rate:.3f}", f"{kept:.3f}"))
    assert lines == found
    assert f"share {-log2(1 - 0.9**2) / 2:.3f} bits" in " ".join(PAGE.split())


@pytest.mark.parametrize(("bits", "step"), list(GAUSSIAN_STEP.items()))
def test_rotated_has_the_step_of_the_optimal_uniform_quantizer(bits, step):
    assert np.diff(optimal_uniform(bits).levels) == pytest.approx(step, rel=2e-6)
