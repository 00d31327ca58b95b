"""Every estimator refuses, or flags, what it cannot use."""

import numpy as np
import pytest
import torch

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators import ESTIMATORS, CodeEntropy, DitheredChannel, Gaussian
from ib_analysis.estimators.estimate import drifts

pytestmark = pytest.mark.slow

each = pytest.mark.parametrize("method", ESTIMATORS.values(), ids=ESTIMATORS)
continuous = pytest.mark.parametrize("method", [m for n, m in ESTIMATORS.items() if n != "code_entropy"], ids=lambda m: m.name)


@pytest.fixture
def pair():
    """x and a decoded copy of 4 bits that every method accepts."""
    x = np.random.default_rng(0).standard_normal((200, 2))
    return x, 0.5 * (np.clip(np.floor(x / 0.5), -8, 7) + 0.5)


@each
def test_accepts_arrays_and_tensors_and_leaves_them_alone(method, pair):
    x, y = pair
    kept = x.copy(), y.copy()
    estimate = method.estimate(torch.tensor(x, requires_grad=True), y)
    assert np.isfinite(estimate.bits)
    assert estimate.interval[0] <= estimate.bits <= estimate.interval[1]
    assert "bits [" in str(estimate)
    assert estimate.bits == method.estimate(x, torch.tensor(y)).bits
    assert np.array_equal(x, kept[0]) and np.array_equal(y, kept[1])


@each
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(method, bad, pair):
    x, y = pair
    x, y = x.copy(), y.copy()
    x[17, 1] = bad
    with pytest.raises(EstimatorError, match=r"x holds NaN or infinity, first at index \[17, 1\]"):
        method.estimate(x, y)
    with pytest.raises(EstimatorError, match="y holds NaN or infinity"):
        method.estimate(y, x)


@each
def test_what_holds_no_numbers(method, pair):
    x, y = pair
    for bad in (None, "text", x.astype(object), x + 1j, torch.tensor(x) + 1j, [[1.0], [1.0, 2.0]]):
        with pytest.raises(EstimatorError, match=r"^x "):
            method.estimate(bad, y)
        with pytest.raises(EstimatorError, match=r"^y "):
            method.estimate(x, bad)


@each
def test_lengths_that_differ(method, pair):
    x, y = pair
    with pytest.raises(EstimatorError, match="agree"):
        method.estimate(x[:199], y)
    with pytest.raises(EstimatorError, match="agree"):
        method.estimate(x[None], y)


@each
def test_one_sample_or_none(method, pair):
    x, y = pair
    with pytest.raises(EstimatorError, match="one sample"):
        method.estimate(x[:1], y[:1])
    with pytest.raises(EstimatorError, match="empty"):
        method.estimate(x[:0], y[:0])
    with pytest.raises(EstimatorError, match="empty"):
        method.estimate(x[:, :0], y)


@each
def test_missing_dimension(method, pair):
    x, y = pair
    with pytest.raises(EstimatorError, match=r"pass scalars as x\[:, None\]"):
        method.estimate(x[:, 0], y)


@each
def test_documents_that_do_not_fit(method, pair):
    with pytest.raises(EstimatorError, match="each of the 200 samples"):
        method.estimate(*pair, np.arange(199))
    with pytest.raises(EstimatorError, match="one document"):
        method.estimate(*pair, np.zeros(200))


@continuous
def test_integers(method, pair):
    x, y = pair
    with pytest.raises(EstimatorError, match="y must hold floats"):
        method.estimate(x, np.round(y).astype(np.int64))
    with pytest.raises(EstimatorError, match="x must hold floats"):
        method.estimate(torch.tensor(np.round(x)).int(), y)


@continuous
def test_constant_columns(method, pair):
    x, y = pair
    y = y.copy()
    y[:, 1] = 0.25
    with pytest.raises(EstimatorError, match="column 1 of y is constant"):
        method.estimate(x, y)
    heads = np.stack([x, np.where([True, False], 1.0, x)])
    with pytest.raises(EstimatorError, match=r"column 0 of head \[1\] of x is constant"):
        method.estimate(heads, np.stack([pair[1], pair[1]]))


@each
def test_fewer_samples_than_dimensions(method):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((10, 12))
    y = np.round(2 * x) / 2 + 0.1 * (method.name == "dithered_channel")
    try:
        estimate = method.estimate(x, y)
    except EstimatorError:
        return
    assert "too few samples" in estimate.flags


def test_batches_print_their_sum():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 100, 2))
    text = str(Gaussian().estimate(x, x + rng.standard_normal((3, 100, 2))))
    assert text.startswith("3 heads, ")


def test_flags_name_the_heads():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 1000, 2))
    x[1] = np.exp(x[1])
    flags = Gaussian().estimate(x, x + rng.standard_normal((3, 1000, 2))).flags
    assert flags["Gaussian misfit"].tolist() == [False, True, False]


@pytest.mark.parametrize("method", [CodeEntropy(), DitheredChannel()], ids=lambda method: method.name)
def test_registry_holds_every_method_under_its_name(method):
    assert ESTIMATORS[method.name] == method


@pytest.mark.parametrize(
    ("values", "drifting"),
    [
        ((1.0, 0.8, 0.5), True),
        ((0.5, 0.8, 1.0), True),
        ((1.0, 0.95, 0.9), False),
        ((1.0, 0.8, 0.9), False),
        ((1.0, np.nan, 1.0), True),
    ],
)
def test_drift_is_a_steady_move_beyond_what_is_allowed(values, drifting):
    whole, halves, quarters = (torch.tensor([value]) for value in values)
    assert drifts(whole, halves, quarters, torch.tensor([0.1])).tolist() == [drifting]
