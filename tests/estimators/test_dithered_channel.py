"""The dithered channel between its two bounds, where sample-only estimators saturate."""

from math import log

import numpy as np
import pytest

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators import CodeEntropy, DitheredChannel, Gaussian
from ib_analysis.estimators.dithered_channel import SPACE_FILLING_BITS
from ib_analysis.estimators.estimate import GAUSSIAN_MISFIT
from ib_analysis.estimators.known_information import KNOWN_TASKS, quantized_gaussian
from ib_analysis.estimators.quantizers import dithered_bits, lloyd_max


def test_head_at_4_bit(draws):
    task = KNOWN_TASKS["quantized gaussian 64x64 4 bit"]
    x, y = draws(task.name, 10_000, 1)
    estimate = DitheredChannel().estimate(x[0], y[0])
    low, high = estimate.interval
    assert estimate.bits * log(2) == pytest.approx(95.7, rel=0.01)
    assert low <= task.information_bits <= high + 0.15  # H(T), whose own sampling error limits the upper end
    assert not estimate.flags


def dithered(rng, x, step):
    return x + rng.uniform(-step / 2, step / 2, x.shape)


@pytest.mark.parametrize("step", [2.0, 1.0, 0.5, 0.25])
def test_interval_contains_the_information_of_dithered_normals(step):
    """Exact by quadrature; at high resolution the upper end is met, so it must carry its sampling error."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 2000, 4))
    estimate = DitheredChannel().estimate(x, dithered(rng, x, step))
    low, high = estimate.interval
    assert ((low <= 4 * dithered_bits(step)) & (4 * dithered_bits(step) <= high)).mean() > 0.9


@pytest.mark.parametrize(("dim", "step", "count"), [(1, 2.0, 200), (64, 0.8, 1300), (64, 0.25, 1300)])
def test_gaussian_value_is_unbiased_and_its_error_known(dim, step, count):
    rng = np.random.default_rng(0)
    covariance = 0.9 ** np.abs(np.subtract.outer(np.arange(dim), np.arange(dim)))
    x = rng.standard_normal((60, count, dim)) @ np.linalg.cholesky(covariance).T
    estimate = DitheredChannel().estimate(x, dithered(rng, x, step))
    truth = np.linalg.slogdet(np.eye(dim) + covariance * 12 / step**2)[1] / 2 / log(2)
    spread = estimate.bits.std(ddof=1)
    assert estimate.bits.mean() == pytest.approx(truth, abs=4 * spread / 60**0.5)
    half_width = ((estimate.interval[1] - dim * SPACE_FILLING_BITS) - estimate.interval[0]) / 2
    assert half_width.mean() == pytest.approx(1.96 * spread, rel=0.3)


def test_decoders_that_shrink_are_understood():
    """Lloyd and Max decode to the mean of the cell: the error is then uncorrelated with y, not with x."""
    x = np.random.default_rng(0).standard_normal((50_000, 1))
    table = lloyd_max(4)
    y = table.levels[np.digitize(x, table.thresholds)]
    bits = float(DitheredChannel().estimate(x, y).bits)
    assert bits == pytest.approx(-np.log2(table.distortion) / 2, abs=0.02)
    assert bits == pytest.approx(float(DitheredChannel().estimate(x, 7 - 3 * y).bits), abs=1e-9)


def test_agrees_with_the_gaussian_estimator_on_its_channel():
    """Noise of independent channels is all that the two differ in."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20_000, 6)) @ np.linalg.cholesky(0.5 * np.eye(6) + 0.5).T
    y = dithered(rng, x, 1.0)
    assert DitheredChannel().estimate(x, y).bits == pytest.approx(Gaussian().estimate(x, y).bits, abs=0.02)


@pytest.mark.parametrize("step", [0.3352, 1.0])
def test_coarser_cells_keep_less(step):
    x = np.random.default_rng(0).standard_normal((5000, 8))
    fine, coarse = (cell * (np.floor(x / cell) + 0.5) for cell in (step, 4 * step / 2))
    assert DitheredChannel().estimate(x, fine).bits > DitheredChannel().estimate(x, coarse).bits


def test_lies_below_the_entropy_of_the_codes():
    x, y = quantized_gaussian(8, bits=4, step=0.3352).sample(20_000, np.random.default_rng(0))
    assert DitheredChannel().estimate(x, y).bits < CodeEntropy().estimate(x, y).bits


def test_heads_in_a_batch_are_estimated_alone():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 2, 1000, 3))
    y = dithered(rng, x, np.array([0.5, 2.0])[:, None, None, None])
    batch = DitheredChannel().estimate(x, y)
    for head in np.ndindex(2, 2):
        alone = DitheredChannel().estimate(x[head], y[head])
        assert alone.bits == pytest.approx(batch.bits[head], abs=1e-10)
        assert alone.interval == pytest.approx([end[head] for end in batch.interval], abs=1e-10)


def test_a_source_that_is_not_gaussian_is_flagged():
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, (4000, 3))
    assert GAUSSIAN_MISFIT in DitheredChannel().estimate(x, dithered(rng, x, 0.5)).flags


def test_channels_may_repeat_each_other():
    """The noise makes y of full rank even if x is not; the kurtosis of x cannot be judged then."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal((4000, 2)), 2, axis=1)
    estimate = DitheredChannel().estimate(x, dithered(rng, x, 1.0))
    truth = np.log2(1 + 2 * 12) / 2 * 2  # two looks at each of two variables
    assert estimate.bits == pytest.approx(truth, abs=0.05)
    assert GAUSSIAN_MISFIT in estimate.flags


def test_what_is_no_decoded_x_is_refused():
    rng = np.random.default_rng(0)
    x, other = rng.standard_normal((2, 1000, 3))
    with pytest.raises(EstimatorError, match="2 and 3"):
        DitheredChannel().estimate(x, x[:, :2])
    with pytest.raises(EstimatorError, match="copy of x"):
        DitheredChannel().estimate(x, 2 * x + 1)
    with pytest.raises(EstimatorError, match="no decoded x"):
        DitheredChannel().estimate(x, other)
