"""The rotated format in plain torch: a Hadamard matrix makes the channels of a token alike and nearly Gaussian, so that one fp16
scale a token and the uniform quantizer that is optimal for a Gaussian serve all of them.

The rotation is that of QuaRot (Ashkboos et al. 2024, arXiv 2404.00456), the optimal step that of Max (1960).
Keys are centred first: a constant added to all keys of a head drops out of the softmax, and their mean is often large.
Any centre is right, so that of a long run is the mean of a sample: up to CENTRE_TOKENS tokens, evenly spaced.
"""

from __future__ import annotations

import math

import torch
from ib_kernels import ragged
from ib_kernels.formats.format import FP16_MAX, MetadataRows, Side
from torch import Tensor

# Step, in standard deviations, of the mid-rise uniform quantizer with 2**bits levels that has the least mean squared
# error on a Gaussian: .11885, .03744, .01154 and 8.769e-5 of the variance.
GAUSSIAN_STEP = {2: 0.995687, 3: 0.586019, 4: 0.335201, 8: 0.0307624}

CENTRE_TOKENS = 4096  # at most, of a run


class RotatedValues:
    """Scale [N, 1]: one a token. Rows are rotated as they are."""

    def metadata(self, head_dim: int) -> dict[str, MetadataRows]:
        return {"scale": MetadataRows(1)}

    def fit(self, x: Tensor, lengths: Tensor) -> Side:
        return {}

    def quantize(self, x: Tensor, lengths: Tensor, bits: int, fitted: Side) -> tuple[Tensor, Side]:
        codes, scale = _quantize(hadamard(x.clamp(-FP16_MAX, FP16_MAX)), bits)
        return codes, {"scale": scale}

    def dequantize(self, codes: Tensor, metadata: Side, lengths: Tensor, bits: int) -> Tensor:
        return _dequantize(codes, metadata["scale"], bits)


class RotatedKeys:
    """Scale [N, 1]: one a token; centre [P, D]: the mean of the first tokens that the run received, or of a sample of them.

    The sample of n tokens is every s-th, from the first, with s = ceil(n / CENTRE_TOKENS).
    """

    def metadata(self, head_dim: int) -> dict[str, MetadataRows]:
        return {"scale": MetadataRows(1), "centre": MetadataRows(head_dim, tokens_per_row=0)}

    def fit(self, x: Tensor, lengths: Tensor) -> Side:
        spacing = ((lengths + CENTRE_TOKENS - 1) // CENTRE_TOKENS).clamp(min=1)  # [P]
        counts = (lengths + spacing - 1) // spacing
        total = int(counts.sum())
        run = ragged.run_of_row(counts, total)
        sample = ragged.starts(lengths)[run] + ragged.position_in_run(counts, total) * spacing[run]
        padded, _ = ragged.pad(x[sample].clamp(-FP16_MAX, FP16_MAX), counts)  # [P, at most CENTRE_TOKENS, D]
        # The sum is in float64, so that its order, which depends on the batch, does not show in the fp16 centre.
        return {"centre": (padded.sum(1, dtype=torch.float64) / counts.clamp(min=1)[:, None]).to(torch.float16)}

    def quantize(self, x: Tensor, lengths: Tensor, bits: int, fitted: Side) -> tuple[Tensor, Side]:
        centred = x.clamp(-FP16_MAX, FP16_MAX) - fitted["centre"].float()[ragged.run_of_row(lengths, x.shape[0])]
        codes, scale = _quantize(hadamard(centred), bits)
        return codes, {"scale": scale, "centre": fitted["centre"]}

    def dequantize(self, codes: Tensor, metadata: Side, lengths: Tensor, bits: int) -> Tensor:
        centred = _dequantize(codes, metadata["scale"], bits)
        return centred + metadata["centre"].float()[ragged.run_of_row(lengths, codes.shape[0])]


def hadamard_order(head_dim: int) -> int:
    """Channels that are rotated together, the order of the Hadamard matrix: the largest power of two that divides head_dim."""
    return head_dim & -head_dim


def hadamard(x: Tensor) -> Tensor:
    """Multiply rows [N, D] by the block-diagonal Hadamard matrix of +1 and -1.

    It is symmetric; over the root of its blocks' order it is orthonormal.

    It is applied by butterflies because in a matrix product the order of the additions, and with it the last bit of the
    result, depends on N; on columns, because these are long.
    """
    tokens, head_dim = x.shape
    columns, spare = x.t().clone(memory_format=torch.contiguous_format), x.new_empty(head_dim, tokens)
    half = 1
    while half < hadamard_order(head_dim):
        pairs, rotated = (x.view(head_dim // (2 * half), 2, half, tokens) for x in (columns, spare))
        torch.add(pairs[:, 0], pairs[:, 1], out=rotated[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=rotated[:, 1])
        columns, spare = spare, columns
        half *= 2
    return columns.t().contiguous()


def _quantize(turned: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, D] and scale fp16 [N, 1], the Gaussian-optimal step for the root mean square of the rotated token.

    Of the range of all levels a channel lies at a share between 0 and 1, and code c stands for shares in (c, c + 1] / 2**bits.
    """
    head_dim, order = turned.shape[1], hadamard_order(turned.shape[1])
    mean_square = _sum_of_squares(turned) / (head_dim * order)
    scale = (GAUSSIAN_STEP[bits] * mean_square.sqrt()).clamp(max=FP16_MAX).to(torch.float16)
    # A scale of 0 stands for a row of 0, whatever its codes. One factor a token: a division an element would be slow on a GPU.
    per_range = scale.float().clamp(min=2.0**-24).reciprocal_().mul_(1 / (2**bits * math.sqrt(order)))
    share = (turned * per_range).add_(0.5).clamp_(0, 1)
    codes = share.mul_(2**bits).ceil_().sub_(1).clamp_(min=0)
    return codes.to(torch.uint8), scale


def _dequantize(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Rows [N, D], rotated back: each code stands for the middle of its step."""
    step = scale.float() * (1 / math.sqrt(hadamard_order(codes.shape[1])))
    return hadamard(codes.float().sub_((2**bits - 1) / 2).mul_(step))


def _sum_of_squares(turned: Tensor) -> Tensor:
    """fp64 [N, 1]. Every eighth square is added in float32, in one order on all machines, and these sums in float64."""
    squares = torch.nn.functional.pad(turned.square(), (0, -turned.shape[1] % 8)).unflatten(1, (-1, 8))  # [N, ceil(D / 8), 8]
    lanes = squares[:, 0].clone()
    for i in range(1, squares.shape[1]):
        lanes += squares[:, i]
    return lanes.sum(1, keepdim=True, dtype=torch.float64)
