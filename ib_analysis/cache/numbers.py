"""Which keys and values can be kept."""

from __future__ import annotations

import torch
from ib_kernels.formats.format import FP16_MAX
from torch import Tensor


def check_range(layer: object, keys: Tensor, values: Tensor) -> None:
    """Raises ValueError for numbers of 32 or 64 bits that float16, in which they are kept, turns into infinities."""
    for name, x in (("key", keys), ("value", values)):
        if x.dtype in (torch.float32, torch.float64) and float(largest := x.detach().abs().amax()) > FP16_MAX:
            raise ValueError(
                f"layer {layer} has a {name} of {float(largest):.4g}, more than float16 holds ({FP16_MAX:.0f}): "
                "load the model with dtype=torch.bfloat16"
            )


def readable(x: Tensor) -> Tensor:
    """x as quantizers take it: no double precision, the channels of a token side by side."""
    x = x.float() if x.dtype == torch.float64 else x
    return x if x.stride(-1) == 1 else x.contiguous()
