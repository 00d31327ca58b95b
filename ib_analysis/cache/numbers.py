"""Which keys and values can be kept."""

from __future__ import annotations

import warnings

import torch
from ib_kernels.formats.format import FP16_MAX
from torch import Tensor


def check_range(layer: object, keys: Tensor, values: Tensor) -> None:
    """Raises ValueError for numbers of 32 or 64 bits that float16, in which they are kept, turns into infinities."""
    for name, x in (("key", keys), ("value", values)):
        if x.dtype in (torch.float32, torch.float64) and (largest := _largest(x)) > FP16_MAX:
            raise ValueError(
                f"layer {layer} has a {name} of {largest:.4g}, more than float16 holds ({FP16_MAX:.0f}): "
                "load the model with dtype=torch.bfloat16"
            )


def warn_if_cut(layer: object, keys: Tensor, values: Tensor) -> None:
    """Warns of numbers of bfloat16 that quantized tokens, whose scales are float16, keep as the largest of these."""
    for name, x in (("key", keys), ("value", values)):
        if x.dtype == torch.bfloat16 and x.numel() and _largest(x) > FP16_MAX:
            warnings.warn(
                f"layer {layer} has a {name} of more than {FP16_MAX:.0f}, which quantized tokens keep as {FP16_MAX:.0f}: see "
                "what the allocation loses (allocation.validate), or take a budget that keeps tokens at 16 bits",
                stacklevel=3,
            )


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().amax())


def readable(x: Tensor) -> Tensor:
    """x as quantizers take it: no double precision, the channels of a token side by side."""
    x = x.float() if x.dtype == torch.float64 else x
    return x if x.stride(-1) == 1 else x.contiguous()
