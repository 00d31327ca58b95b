"""Samples come in any layout and at any scale."""

from typing import Any

import numpy as np
import pytest
import torch

from ib_analysis.estimators import KSG, CopulaGaussian, DitheredChannel, Gaussian
from ib_analysis.estimators.samples import as_numbers, check_samples


@pytest.fixture
def pair():
    """x and a decoded copy of 4 bits."""
    x = np.random.default_rng(0).standard_normal((200, 2))
    return x, 0.5 * (np.clip(np.floor(x / 0.5), -8, 7) + 0.5)


@pytest.mark.parametrize("dtype", [">f8", "<f8", ">f4", np.float16, np.longdouble, ">i4", np.uint16, np.uint64, bool])
def test_arrays_of_any_layout(dtype):
    values = np.arange(12).reshape(4, 3).astype(dtype)
    views: list[Any] = [values, values[::-1], values.T, values[:, ::-2], values.tolist()]
    for view in views:
        found = as_numbers("x", view)
        assert found.dtype == torch.float64
        assert found.numpy().tolist() == np.asarray(view).astype(float).tolist()


def test_lists_keep_double_precision():
    nested: Any = [[0.1], [0.2]]
    assert as_numbers("x", nested).flatten().tolist() == [0.1, 0.2]


def test_arrays_are_not_shared_with_the_samples(pair):
    assert not np.shares_memory(as_numbers("x", pair[0]).numpy(), pair[0])


@pytest.mark.parametrize("exponent", [-1000, -600, 600, 1020])
def test_extreme_scales_are_undone_exactly(exponent, pair):
    x, y = pair
    found = check_samples(np.ldexp(x, exponent), np.ldexp(y, exponent), None)
    for values, given in ((found.x, x), (found.y, y)):
        ratios = values.numpy() / given
        assert (ratios == ratios[:1]).all()
        assert (np.frexp(ratios[0])[0] == 0.5).all()  # powers of two
        assert (values.abs().amax(0) < 1).all() and (values.abs().amax(0) >= 0.5).all()


def test_ordinary_scales_are_left_alone(pair):
    x, y = pair
    found = check_samples(1e9 * x, 1e-9 * y, None)
    assert np.array_equal(found.x.numpy(), 1e9 * x) and np.array_equal(found.y.numpy(), 1e-9 * y)


@pytest.mark.parametrize("method", [Gaussian(), CopulaGaussian(), KSG(), DitheredChannel()], ids=lambda method: method.name)
@pytest.mark.parametrize("exponent", [-1030, 1020])
def test_no_scale_changes_information(method, exponent, pair):
    x, y = pair
    expected, found = method.estimate(x, y), method.estimate(np.ldexp(x, exponent), np.ldexp(y, exponent))
    assert found.bits == pytest.approx(expected.bits, abs=1e-3)  # the least are subnormal, so they lost digits
    assert found.flags.keys() == expected.flags.keys()
