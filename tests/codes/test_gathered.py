"""What is gathered of a side of a tier does not depend on where its values lie."""

import pytest
import torch

from ib_analysis.codes.gathered import Gathered
from ib_analysis.estimators.moments import Moments

MEANS = [0.0, 128.0, 4096.0]


def gathered(values):
    """Of values [N, D] in prompts of 100 tokens, as raw floats that a cache would hold exactly."""
    found = Gathered(16, torch.float16, Moments(1))
    for part in values.split(100):
        found.add(part[None], torch.zeros(1, *part.shape, dtype=torch.int64), part[None])
    return found


@pytest.mark.parametrize("mean", MEANS)
def test_values_of_few_dimensions_with_a_large_mean(mean):
    """Eight words span 7 of 16 dimensions; what channels share is the same wherever the values lie."""
    words = torch.randint(-64, 64, (8, 16)).double()
    values = words[torch.randint(0, 8, (2000,))]
    expected, found = gathered(values), gathered(values + mean)
    assert found.total_correlation_bits().tolist() == pytest.approx(expected.total_correlation_bits().tolist(), rel=1e-3)
    assert found.total_correlation_bits().isfinite().all()
    assert found.gaussian_bits()[0].isfinite().all()


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("power", [1, 3])
def test_misfit_is_that_of_the_shape(mean, power):
    values = torch.randn(4000, 4, dtype=torch.float64).pow(power) * 1e-3 + mean
    assert gathered(values).misfit().tolist() == [power == 3]


def test_a_constant_channel_has_no_misfit():
    values = torch.randn(4000, 4, dtype=torch.float64)
    values[:, 0] = 0.1
    assert gathered(values).misfit().tolist() == [False]


def test_few_tokens_share_an_unknown_amount():
    assert gathered(torch.randn(16, 16)).total_correlation_bits().isnan().all()
