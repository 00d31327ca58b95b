"""Streamed moments give what all samples at once would give."""

import numpy as np
import pytest
import torch

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators import Gaussian, Moments
from ib_analysis.estimators.estimate import TOO_FEW
from ib_analysis.estimators.known_information import sparse


def streamed(x, y, lengths):
    moments = Moments()
    starts = np.cumsum([0, *lengths])
    for start, end in zip(starts, starts[1:]):
        moments.add(x[..., start:end, :], y[..., start:end, :])
    return moments


@pytest.mark.parametrize("lengths", [[125] * 8, [1] * 30 + [500, 300, 100, 70], [10] * 100])
def test_equals_the_estimator_of_all_samples(lengths):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3, 1000, 4)), rng.standard_normal((2, 3, 1000, 2))
    y = y + x[..., :2] + 100  # a mean far from 0, which a sum of squares would lose to rounding
    estimate = streamed(x, y, lengths).estimate()
    assert estimate.bits == pytest.approx(Gaussian().estimate(x, y).bits, abs=1e-9)


def test_interval_contains_the_truth():
    """100 heads of 16 documents; each document repeats a third of its samples, so samples are not independent."""
    task = sparse(3)
    rng = np.random.default_rng(0)
    pairs = [task.sample(16 * 60, rng) for _ in range(100)]
    x, y = (np.stack([pair[i] for pair in pairs]) for i in (0, 1))
    order = np.concatenate([start + np.tile(np.arange(20), 3) for start in range(0, 960, 60)])
    low, high = streamed(x[:, order], y[:, order], [60] * 16).estimate().interval
    hits = ((low <= task.information_bits) & (task.information_bits <= high)).sum()
    assert 90 <= hits <= 99


def test_memory_does_not_grow():
    moments = Moments()
    rng = np.random.default_rng(0)

    def size():
        return sum(value.numel() for value in vars(moments).values() if isinstance(value, torch.Tensor))

    moments.add(*rng.standard_normal((2, 4, 50, 3)))
    first = size()
    for _ in range(50):
        moments.add(*rng.standard_normal((2, 4, 50, 3)))
    assert size() == first


def test_few_samples_are_flagged():
    x, y = sparse(5).sample(120, np.random.default_rng(0))
    assert TOO_FEW in streamed(x, y, [12] * 8).estimate().flags
    assert TOO_FEW in streamed(x, y, [15] * 8).estimate().flags  # enough samples, of 8 documents
    assert TOO_FEW not in streamed(x, y, [10] * 12).estimate().flags


def test_what_cannot_be_added_is_refused():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 100, 3))
    with pytest.raises(EstimatorError, match="0 documents are too few"):
        Moments().estimate()
    moments = streamed(x, y, [10] * 7)
    with pytest.raises(EstimatorError, match="7 documents are too few"):
        moments.estimate()
    for bad_x, bad_y in ((x[:, :2], y), (x, y[:, :2]), (x[:, :2], np.concatenate([y, y[:, :1]], axis=1)), (x[None], y[None])):
        with pytest.raises(EstimatorError, match="same heads and dimensions"):
            moments.add(bad_x, bad_y)
    with pytest.raises(EstimatorError, match="NaN"):
        moments.add(np.where(x > 2, np.nan, x), y)
    moments.add(x[70:80], y[70:80])
    assert moments.estimate().bits == pytest.approx(streamed(x, y, [10] * 8).estimate().bits)


def test_singular_moments_are_refused():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 100, 3))
    with pytest.raises(EstimatorError, match="constant"):
        streamed(np.concatenate([x, np.ones((100, 1))], axis=1), y, [10] * 10).estimate()
    with pytest.raises(EstimatorError, match="infinite"):
        streamed(x, 2 * x, [10] * 10).estimate()
    wide_x, wide_y = rng.standard_normal((2, 10, 6))
    with pytest.raises(EstimatorError, match="10 samples of 12 dimensions"):
        streamed(wide_x, wide_y, [1] * 10).estimate()
