"""Queries and keys as they would be at one position."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from ib_analysis.errors import UnsupportedModelError


def at_last_position(module: nn.Module, x: Tensor) -> Tensor:
    """Rotated queries or keys x [..., T, D] of consecutive positions, all turned to the last of these: fp32.

    Raises UnsupportedModelError unless positions rotate all channels, as in Llama.
    """
    return turned(x.float(), torch.arange(x.shape[-2] - 1, -1, -1, device=x.device), frequencies(module, x))


def without_positions(module: nn.Module, keys: Tensor) -> Tensor:
    """Rotated keys [..., T, D] as they would be at one position; as they are where it is not known how positions rotate them."""
    try:
        return at_last_position(module, keys)
    except UnsupportedModelError:
        return keys.float()


def frequencies(module: nn.Module, x: Tensor) -> Tensor:
    """Radians a position by which each pair of channels of x [..., D] turns: fp32 [D / 2]."""
    rotate = getattr(sys.modules[type(module).__module__], "rotate_half", rotate_half)
    pairs = torch.arange(4.0)
    if not torch.equal(rotate(pairs), rotate_half(pairs)):
        raise UnsupportedModelError(
            f"{type(module).__name__} turns neighbouring channels by position, not those half the channels apart: use another "
            "scorer than expected_attention"
        )
    config = getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict) or "rope_type" not in parameters or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not turn all channels by position as Llama does, so its queries to come are not "
            "known: use another scorer than expected_attention"
        )
    found: Tensor = LlamaRotaryEmbedding(config).inv_freq
    if len(found) != x.shape[-1] // 2:
        raise UnsupportedModelError(
            f"{type(module).__name__} turns {2 * len(found)} of {x.shape[-1]} channels by position: use another scorer than "
            "expected_attention"
        )
    return found.to(x.device)


def turned(x: Tensor, positions: Tensor, radians: Tensor) -> Tensor:
    """x [..., M or 1, D] turned by so many positions [M]."""
    angles = (positions[:, None] * radians).repeat(1, 2)  # [M, D]
    return x * angles.cos() + rotate_half(x) * angles.sin()
