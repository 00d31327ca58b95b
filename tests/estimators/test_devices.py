"""Estimates on a GPU are those on the processor."""

import numpy as np
import pytest
import torch

from ib_analysis.estimators import ESTIMATORS, Moments
from ib_analysis.estimators.known_information import quantized_gaussian

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def pair():
    pairs = [quantized_gaussian(3, bits=4, step=0.5, correlation=0.9).sample(600, np.random.default_rng(seed)) for seed in (0, 1)]
    return torch.tensor(np.stack([x for x, _ in pairs])), torch.tensor(np.stack([y for _, y in pairs]))


@pytest.mark.parametrize("method", ESTIMATORS.values(), ids=ESTIMATORS)
def test_estimates_agree(method, pair):
    x, y = pair
    there, here = method.estimate(x.cuda(), y.cuda()), method.estimate(x, y)
    trained = method.name in ("infonce", "mine", "nwj")
    assert there.bits == pytest.approx(here.bits, abs=0.1 if trained else 1e-9)
    assert np.array(there.interval) == pytest.approx(np.array(here.interval), abs=0.1 if trained else 1e-9)
    assert trained or set(there.flags) == set(here.flags)


def test_moments_agree(pair):
    here, there = Moments(), Moments()
    for x, y in zip(*(values.split(50, dim=1) for values in pair)):
        here.add(x, y)
        there.add(x.cuda(), y.cuda())
    assert there.estimate().bits == pytest.approx(here.estimate().bits, abs=1e-9)
