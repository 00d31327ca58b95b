"""Information that integer codes hold about what they are computed from: their entropy."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators.bootstrap import bootstrap_interval
from ib_analysis.estimators.chunks import in_chunks
from ib_analysis.estimators.entropy import distinct_values, entropies_of_occurrences_bits, occurrences
from ib_analysis.estimators.estimate import MIN_DOCUMENTS, TOO_FEW, UNSETTLED, Estimate, flagged
from ib_analysis.estimators.gaussian import NORMAL_QUANTILE
from ib_analysis.estimators.samples import Array, Samples, as_numbers, as_tensor, check_documents, check_pairs

SAMPLES_PER_LEVEL = 10
QUERIES = 256  # samples whose neighbour is looked at
SETTLED_SHARE = 0.95  # of neighbours in x that share a column of y, if x settles it


@dataclass(frozen=True)
class CodeEntropy:
    """sum_j H(y_j) of the columns of codes y: the memoryless code rate, with the correction of Miller and Madow.

    I(X; Y) = H(Y) if y is a function of x, else less; and the sum is at least H(Y), as it ignores what columns share. For
    a tighter value subtract `total_correlation_or_nan_bits` of the codes' covariance: right for Gaussians at high resolution.
    "y not settled by x" is raised unless every column of y either steps along the same column of x, or is shared by samples
    that are neighbours in x; among many dimensions there are none so near, so there only the first is seen.
    """

    name: ClassVar[str] = "code_entropy"

    def estimate(self, x: Array, y: Array, documents: Array | None = None) -> Estimate:
        """See Estimator; y may hold integers, or floats that take few values. A constant column has no entropy."""
        first, codes = as_numbers("x", x), as_numbers("y", y)
        check_pairs(first, codes)
        count = codes.shape[-2]
        samples = Samples(first, codes, check_documents(documents, count))
        bits, influence, levels = in_chunks(_measured, codes)
        if as_tensor("y", y).is_floating_point() and (levels > count / 2).any():
            raise EstimatorError("y takes as many values as there are samples: pass integer codes, or use DitheredChannel")
        low, high = bootstrap_interval(bits, influence, samples.documents)
        least = NORMAL_QUANTILE * ((levels - 1).sum(-1) / 2).sqrt() / count / log(2)  # of uniform codes, whose influence is 0
        few = (count < SAMPLES_PER_LEVEL * levels.amax(-1)) | (samples.documents_count < MIN_DOCUMENTS)
        flags = {TOO_FEW: few, UNSETTLED: _unsettled(first, codes)}
        return flagged(bits, low.minimum(bits - least), high.maximum(bits + least), flags)


def _measured(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bits [H], influence on them [H, N] and levels of each column [H, d] of codes [H, N, d]."""
    occurrence = occurrences(codes)
    bits = entropies_of_occurrences_bits(codes, occurrence).sum(-1)
    return bits, -occurrence.double().log2().sum(-1), distinct_values(occurrence)


def _unsettled(x: Tensor, codes: Tensor) -> Tensor:
    """Whether some column of codes [..., N, d] is not seen to be a function of x [..., N, dx]: bool [...]."""
    x = x.to(codes.device)
    settled = torch.zeros(codes.shape[:-2] + codes.shape[-1:], dtype=torch.bool, device=codes.device)
    if x.shape == codes.shape:
        along = codes.mT.gather(-1, x.mT.argsort(dim=-1))  # [..., d, N]
        changes = (along[..., 1:] != along[..., :-1]).sum(-1)
        settled = changes < distinct_values(occurrences(codes))
    if settled.all():
        return ~settled.all(-1)
    scale = x.square().mean(-2, keepdim=True).sqrt().clamp(min=1e-300)
    queries = torch.arange(0, x.shape[-2], -(-x.shape[-2] // QUERIES), device=x.device)
    distance = torch.cdist((x / scale)[..., queries, :], x / scale)  # [..., Q, N]
    distance[..., torch.arange(len(queries), device=x.device), queries] = torch.inf
    neighbour = distance.argmin(-1)[..., None].expand(*codes.shape[:-2], -1, codes.shape[-1])
    alike = (codes.gather(-2, neighbour) == codes[..., queries, :]).double().mean(-2)
    return ~(settled | (alike >= SETTLED_SHARE)).all(-1)
