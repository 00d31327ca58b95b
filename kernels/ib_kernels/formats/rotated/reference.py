"""The rotated format in plain torch: a Hadamard matrix makes the channels of a token alike and nearly Gaussian, so that one fp16
scale a token and a uniform quantizer serve all of them. Its step is the one that is optimal for a Gaussian, or another of a few
if that loses less of this very token.

The rotation is that of QuaRot (Ashkboos et al. 2024, arXiv 2404.00456), the step for a Gaussian that of Max (1960).
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

# What else is tried: at 2 bits multiples of this step, else of the one that ends at the largest channel. The error of Gaussian,
# heavy-tailed and uniform channels is then within 1, 6, 5 and 7% (2, 3, 4, 8 bits) of that of the best of 300 steps.
STEP_MULTIPLES = {2: (0.85, 0.92, 1.11), 3: (0.66, 0.86, 1.0), 4: (0.91, 0.97, 1.015), 8: (1.004, 1.012, 1.02)}

CENTRE_TOKENS = 4096  # at most, of a run
BLOCK_TOKENS = 2048  # that are quantized together in plain torch


class RotatedValues:
    """Scale [N, 1]: one a token. Rows are rotated as they are."""

    def metadata(self, head_dim: int) -> dict[str, MetadataRows]:
        return {"scale": MetadataRows(1)}

    def fit(self, x: Tensor, lengths: Tensor) -> Side:
        return {}

    def quantize(self, x: Tensor, lengths: Tensor, bits: int, fitted: Side) -> tuple[Tensor, Side]:
        codes, scale = _quantize(x.clamp(-FP16_MAX, FP16_MAX), bits)
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
        codes, scale = _quantize(centred, bits)
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
    """
    return _turn(x.t()).t().contiguous()


def _turn(columns: Tensor) -> Tensor:
    """The same for tokens [D, N], which are long rows.

    By butterflies, because in a matrix product the order of the additions, and with it the last bit of the result, depends on N.
    """
    head_dim, tokens = columns.shape
    columns, spare = columns.clone(memory_format=torch.contiguous_format), columns.new_empty(head_dim, tokens)
    half = 1
    while half < hadamard_order(head_dim):
        pairs, turned = (x.view(head_dim // (2 * half), 2, half, tokens) for x in (columns, spare))
        torch.add(pairs[:, 0], pairs[:, 1], out=turned[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=turned[:, 1])
        columns, spare = spare, columns
        half *= 2
    return columns


def _quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, D] and scale fp16 [N, 1] of rows x, in blocks that stay in a CPU's cache while steps are tried."""
    codes, scales = zip(*(_quantize_turned(_turn(block.t()), bits) for block in x.split(BLOCK_TOKENS)))
    return torch.cat([some.t() for some in codes]), torch.cat(scales)[:, None]


def _quantize_turned(turned: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [D, N] and scale fp16 [N] of rotated tokens [D, N].

    Of the range of all levels a channel lies at a share between 0 and 1, and code c stands for shares in (c, c + 1] / 2**bits.
    """
    scale = _least_error_scale(turned, bits)
    per_range = _reciprocal(scale).mul_(1 / (2**bits * math.sqrt(hadamard_order(turned.shape[0]))))
    share = (turned * per_range).add_(0.5).clamp_(0, 1)
    codes = share.mul_(2**bits).ceil_().sub_(1).clamp_(min=0)
    return codes.to(torch.uint8), scale


def _least_error_scale(turned: Tensor, bits: int) -> Tensor:
    """fp16 [N]: the step for a Gaussian, or of a few others the first with the least squared error of a token of [D, N]."""
    head_dim, order = turned.shape[0], hadamard_order(turned.shape[0])
    mean_square = _sum_of_squares(turned) / (head_dim * order)
    scale = (GAUSSIAN_STEP[bits] * mean_square.sqrt()).clamp(max=FP16_MAX).to(torch.float16)
    magnitudes = turned.abs()
    base = scale.float() if bits == 2 else magnitudes.amax(0) * (1 / (2 ** (bits - 1) * math.sqrt(order)))
    least = _squared_error(magnitudes, scale, bits)
    for multiple in STEP_MULTIPLES[bits]:
        step = (base * multiple).clamp(2.0**-24, FP16_MAX).to(torch.float16)
        error = _squared_error(magnitudes, step, bits)
        less = error < least  # not if NaN
        scale, least = torch.where(less, step, scale), torch.where(less, error, least)
    return scale


def _squared_error(magnitudes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """fp64 [N]: what quantizing channels of these magnitudes [D, N] loses. Signs do not matter: levels are symmetric about 0."""
    steps = magnitudes * _reciprocal(scale).mul_(1 / math.sqrt(hadamard_order(magnitudes.shape[0])))
    middle = steps.floor().clamp_(max=2 ** (bits - 1) - 1).add_(0.5)
    return _sum_of_squares(steps.sub_(middle)) * scale.double().square()


def _reciprocal(scale: Tensor) -> Tensor:
    """One factor a token in fp32: a division an element would be slow on a GPU. A scale of 0 stands for 0, whatever the codes."""
    return scale.float().clamp(min=2.0**-24).reciprocal_()


def _dequantize(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Rows [N, D], rotated back: each code stands for the middle of its step."""
    step = scale.float() * (1 / math.sqrt(hadamard_order(codes.shape[1])))
    return hadamard(codes.float().sub_((2**bits - 1) / 2).mul_(step))


def _sum_of_squares(columns: Tensor) -> Tensor:
    """fp64 [N] of [D, N]. Every eighth square is added in float32, in one order on all machines, and these sums in float64."""
    squares = torch.nn.functional.pad(columns.square(), (0, 0, 0, -columns.shape[0] % 8)).unflatten(0, (-1, 8))
    lanes = squares[0].clone()  # [8, N]
    for more in squares[1:]:
        lanes += more
    return lanes.sum(0, dtype=torch.float64)
