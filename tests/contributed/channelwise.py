"""Information of each channel alone, if Gaussian: an estimator in one file."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators import Estimate
from ib_analysis.estimators.samples import Array, check_samples


@dataclass(frozen=True)
class Channelwise:
    """The sum over channels of -1/2 log2(1 - r^2), r the correlation of x_j and y_j; interval by Fisher's transformation."""

    name: ClassVar[str] = "channelwise"

    def estimate(self, x: Array, y: Array, documents: Array | None = None) -> Estimate:
        samples = check_samples(x, y, documents)
        if samples.dim_x != samples.dim_y:
            raise EstimatorError(f"x and y must have the same channels, not {samples.dim_x} and {samples.dim_y}: pass decoded x")
        a, b = (values - values.mean(-2, keepdim=True) for values in (samples.x, samples.y))
        r = ((a * b).sum(-2) / (a.square().sum(-2) * b.square().sum(-2)).sqrt()).clamp(-1 + 1e-9, 1 - 1e-9).numpy()
        width = 1.96 / max(1, samples.count - 3) ** 0.5
        ends = [np.tanh(np.maximum(0, np.arctanh(abs(r)) + shift)) for shift in (-width, 0, width)]
        low, bits, high = (-np.log2(1 - end**2).sum(-1) / 2 for end in ends)
        return Estimate(bits, (low, high), {})
