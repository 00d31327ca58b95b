"""A second opinion: what x and y hold at least, by bounds that are cheap and have nothing to do with the estimate."""

from __future__ import annotations

from math import log

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ib_analysis.estimators.chunks import in_chunks
from ib_analysis.estimators.copula import normal_scores
from ib_analysis.estimators.gaussian import information_or_nan_bits, misfit
from ib_analysis.estimators.samples import Samples
from ib_analysis.estimators.unexplained import whitened
from ib_analysis.estimators.views import DEVIATIONS, negentropy_nats, seen_nats

SLACK_BITS = 0.07  # by which an estimate may lie below what another view holds: half of a tenth of a nat
MAX_NEGENTROPY_NATS = 0.02  # of a variable that counts as normal


def contradicted(samples: Samples, bits: Tensor, others_bits: Tensor | None = None) -> Tensor:
    """Whether bits [...] lie clearly below what there is at least, or below `others_bits` [...] if given: bool [...].

    I(X; Y) is no less than 0, than the information of any view, and than that of the Gaussian model if x or y is normal itself,
    as h(X|Y) is no more than the entropy of a normal of the variance that y leaves.
    """

    def measured(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (_least_bits(normal_scores(x), normal_scores(y), samples.documents),)

    (least,) = in_chunks(measured, samples.x, samples.y)
    if others_bits is not None:
        least = least.maximum(others_bits)
    return bits < least - SLACK_BITS


def _least_bits(x: Tensor, y: Tensor, documents: NDArray[np.int64]) -> Tensor:
    """Bits [H] that normal scores x [H, N, dx] and y [H, N, dy] hold for sure."""
    return (seen_nats(x, y, documents) / log(2)).maximum(_gaussian_bound_bits(x, y, len(np.unique(documents))))


def _gaussian_bound_bits(x: Tensor, y: Tensor, independent: int) -> Tensor:
    """The Gaussian information [H], less its error from so many independent samples, where x or y is normal; 0 elsewhere."""
    z = torch.cat([x, y], dim=-1)
    z = z - z.mean(1, keepdim=True)
    bits = information_or_nan_bits(z.mT @ z / z.shape[1], x.shape[-1], z.shape[1]).nan_to_num(0)
    bits = bits.clamp(min=0)
    error = (2 * log(2) * bits / independent).sqrt() / log(2)  # the squared correlations add up to twice the nats at most
    return (bits - DEVIATIONS * error).clamp(min=0).where(_is_normal(x, independent) | _is_normal(y, independent), 0)


def _is_normal(values: Tensor, independent: int) -> Tensor:
    """Whether values [H, N, d] look normal: bool [H]."""
    white = whitened(values)
    return ~misfit(white.square().sum(-1), values.shape[-1]) & (negentropy_nats(white, independent) < MAX_NEGENTROPY_NATS)
