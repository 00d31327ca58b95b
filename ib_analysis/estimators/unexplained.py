"""What a Gaussian model of x and y does not explain, in nats.

Let e be the rest of y that x does not tell linearly, and J the negentropy: by how much less random a variable is than a normal
one of its covariance. The information is then exactly that of the model plus I(e; X) + J(e) - J(Y). Parts of the three are seen:
I(e; X) in a few views, J in whitened columns.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ib_analysis.estimators.order import ordered
from ib_analysis.estimators.views import negentropy_deviation_nats, negentropy_nats, seen_nats

MAX_SAMPLES = 2048  # so that the check takes no longer than what it checks
MAX_UNEXPLAINED_NATS = 0.07
TIED_SHARE = 0.1  # of the values of a column; beyond, the negentropy is infinite
DEVIATIONS = 2.0


def is_unexplained(x: Tensor, y: Tensor, documents: NDArray[np.int64]) -> Tensor:
    """Whether a Gaussian model of x [H, N, dx] and y [H, N, dy] leaves more than 0.07 nats unexplained: bool [H]."""
    step = -(-x.shape[1] // MAX_SAMPLES)
    x, y, documents = x[:, ::step], y[:, ::step], documents[::step]
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    tied_x, tied_y = _tied(x), _tied(y)
    swapped = tied_y & ~tied_x  # the roles of x and y, as e must be of a continuous variable
    for heads, given, other in ((~swapped, x, y), (swapped, y, x)):
        if heads.any():
            nats = _unexplained_nats(given[heads], other[heads], (tied_x & tied_y)[heads], documents)
            found[heads] = nats > MAX_UNEXPLAINED_NATS
    return found


def _unexplained_nats(given: Tensor, other: Tensor, tied: Tensor, documents: NDArray[np.int64]) -> Tensor:
    """The size [H] of I(e; given) + J(e) - J(other) that is sure; where both are tied, of the first term."""
    white_given, white_other = whitened(given), whitened(other)
    gain = white_given.mT @ white_other / given.shape[1]
    rest = whitened(white_other - white_given @ gain)
    seen = seen_nats(white_given, rest, documents)
    independent = len(np.unique(documents))
    shape = negentropy_nats(rest, independent) - negentropy_nats(white_other, independent)
    sure = DEVIATIONS * 2**0.5 * negentropy_deviation_nats(independent, other.shape[-1])
    net = seen + shape
    return torch.where(tied, seen, torch.maximum(net - sure, -net - sure))


def whitened(values: Tensor) -> Tensor:
    """Values [H, N, d] of mean 0 and covariance 1; as they are where that is singular."""
    centred = values - values.mean(1, keepdim=True)
    factor, _ = torch.linalg.cholesky_ex(centred.mT @ centred / values.shape[1])
    white = torch.linalg.solve_triangular(factor, centred.mT, upper=False).mT
    return torch.where(white.isfinite().all((1, 2))[:, None, None], white, centred)


def _tied(values: Tensor) -> Tensor:
    """Whether some column of values [H, N, d] repeats itself: bool [H]."""
    ascending = ordered(values.mT.contiguous())
    return ((ascending[..., 1:] == ascending[..., :-1]).double().mean(-1) > TIED_SHARE).any(-1)
