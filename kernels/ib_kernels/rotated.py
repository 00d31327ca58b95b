"""Rotated format: a Hadamard matrix makes the channels of a token alike and nearly Gaussian, so that one fp16 scale a
token and the uniform quantizer that is optimal for a Gaussian serve all of them.

The rotation is that of QuaRot (Ashkboos et al. 2024, arXiv 2404.00456), the optimal step that of Max (1960).
Keys are centred first: a constant added to all keys of a head drops out of the softmax, and their mean is often large.
"""

from __future__ import annotations

import math

import torch
from ib_kernels import ragged
from ib_kernels.kivi import FP16_MAX
from torch import Tensor

# Step, in standard deviations, of the mid-rise uniform quantizer with 2**bits levels that has the least mean squared
# error on a Gaussian: .11885, .03744, .01154 and 8.769e-5 of the variance.
GAUSSIAN_STEP = {2: 0.995687, 3: 0.586019, 4: 0.335201, 8: 0.0307624}


def centre(x: Tensor, lengths: Tensor) -> Tensor:
    """Mean of every run of rows x fp32 [N, D]: fp16 [P, D], 0 for an empty run."""
    padded, _ = ragged.pad(x.clamp(-FP16_MAX, FP16_MAX), lengths)  # [P, T_max, D]
    # The sum is in float64, so that its order, which depends on the batch, does not show in the fp16 centre.
    total = padded.sum(1, dtype=torch.float64)
    return (total / lengths.clamp(min=1)[:, None]).to(torch.float16)


def quantize_keys(x: Tensor, lengths: Tensor, bits: int, centres: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes uint8 [N, D] of rows x fp32 [N, D] around `centres` fp16 [P, D], and scale fp16 [N, 1]."""
    centred = x.clamp(-FP16_MAX, FP16_MAX) - centres.float()[ragged.run_of_row(lengths)]
    codes, scale = _quantize_rotated(rotate(centred), bits)
    return codes, {"scale": scale, "centre": centres}


def dequantize_keys(codes: Tensor, metadata: dict[str, Tensor], lengths: Tensor, bits: int) -> Tensor:
    """Rows fp32 [N, D] of codes [N, D]."""
    centred = rotate(_dequantize_rotated(codes, metadata["scale"], bits))
    return centred + metadata["centre"].float()[ragged.run_of_row(lengths)]


def quantize_values(x: Tensor, bits: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes uint8 [N, D] of rows x fp32 [N, D], and scale fp16 [N, 1]."""
    codes, scale = _quantize_rotated(rotate(x.clamp(-FP16_MAX, FP16_MAX)), bits)
    return codes, {"scale": scale}


def dequantize_values(codes: Tensor, metadata: dict[str, Tensor], bits: int) -> Tensor:
    """Rows fp32 [N, D] of codes [N, D]."""
    return rotate(_dequantize_rotated(codes, metadata["scale"], bits))


def rotate(x: Tensor) -> Tensor:
    """Multiply rows [N, D] by the orthonormal block-Hadamard matrix of the largest power of two that divides D.

    The matrix is symmetric, so it is its own inverse. It is applied by butterflies because in a matrix
    product the order of the additions, and with it the last bit of the result, depends on N.
    """
    tokens, head_dim = x.shape
    block = head_dim & -head_dim
    half = 1
    while half < block:
        pairs = x.reshape(tokens, head_dim // (2 * half), 2, half)
        left, right = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack((left + right, left - right), dim=2)
        half *= 2
    return x.reshape(tokens, head_dim) / math.sqrt(block)


def _quantize_rotated(rotated: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, D] and scale fp16 [N, 1], the Gaussian-optimal step for the root mean square of the token."""
    mean_square = rotated.square().sum(1, keepdim=True, dtype=torch.float64) / rotated.shape[1]
    scale = (GAUSSIAN_STEP[bits] * mean_square.sqrt()).clamp(max=FP16_MAX).to(torch.float16)
    steps = rotated / scale.float().clamp(min=2.0**-24)  # a scale of 0 stands for a row of 0, whatever its codes
    codes = steps.floor_().add_(2 ** (bits - 1)).clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale


def _dequantize_rotated(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    return codes.float().sub_((2**bits - 1) / 2).mul_(scale.float())
