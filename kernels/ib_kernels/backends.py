"""Which implementation runs: "triton", the kernels, or "reference", plain torch.

The kernels run on a GPU. The environment variable IB_KERNELS, which names one of the two, overrules that; under Triton's
interpreter (TRITON_INTERPRET=1) the kernels run on a CPU too, slowly.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Iterable
from typing import Literal, cast

import torch
from ib_kernels.quantizer import RAW_BITS

Backend = Literal["triton", "reference"]
BACKENDS = ("triton", "reference")
VARIABLE = "IB_KERNELS"
CAPABILITY = 8, 0  # of the oldest GPUs that the kernels are compiled for
FORMATS = ("kivi", "rotated")  # that have kernels
MOST_CHANNELS = 256


def pick_backend(device: torch.device, head_dim: int, forms: Iterable[tuple[str, int, int]]) -> Backend:
    """What runs on this device: on a GPU plain torch if there is no kernel for some tokens, which is logged once.

    Args:
        device: where the tokens are.
        head_dim: their channels.
        forms: (format, key bits, value bits) of all of them.
    """
    backend = default_backend(device)
    if device.type != "cuda" or VARIABLE in os.environ:
        return backend
    reasons = [without_kernels(device), *(without_kernel(head_dim, *form) for form in forms)]
    for reason in reasons:
        if reason is not None:
            _log_once(f"attention to compressed tokens runs in plain PyTorch, which is slower: {reason}")
            return "reference"
    return backend


def default_backend(device: torch.device) -> Backend:
    """The kernels on a GPU that can run them, unless IB_KERNELS says otherwise.

    Raises ValueError if IB_KERNELS is none of "triton" and "reference", or asks for kernels where none can run.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen is None:
        return "triton" if device.type == "cuda" and without_kernels(device) is None else "reference"
    if chosen not in BACKENDS:
        raise ValueError(f"{VARIABLE} must be one of {list(BACKENDS)}, not {chosen!r}")
    if chosen == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{VARIABLE}=triton needs a GPU, not {device}, or Triton's interpreter: set TRITON_INTERPRET=1")
    reason = without_kernels(device) if chosen == "triton" and device.type == "cuda" else None
    if reason is not None:
        raise ValueError(f"{VARIABLE}=triton cannot be: {reason}")
    return cast(Backend, chosen)


def without_kernel(head_dim: int, fmt: str, key_bits: int, value_bits: int) -> str | None:
    """Why there is no kernel for such tokens; None if there is one."""
    if head_dim % 16 or not 16 <= head_dim <= MOST_CHANNELS:
        return f"the GPU kernels need a head_dim that is a multiple of 16 up to {MOST_CHANNELS}, got {head_dim}"
    if (key_bits == RAW_BITS) != (value_bits == RAW_BITS):
        return f"the GPU kernels have no keys of {key_bits} with values of {value_bits} bits: pack both, or leave both at 16 bits"
    if key_bits != RAW_BITS and fmt not in FORMATS:
        return f"the GPU kernels have the formats {list(FORMATS)}, not {fmt!r}"
    return None


def check_kernel(head_dim: int, fmt: str, key_bits: int, value_bits: int) -> None:
    """Raise ValueError if there is no kernel for such tokens."""
    reason = without_kernel(head_dim, fmt, key_bits, value_bits)
    if reason is not None:
        raise ValueError(reason)


@functools.cache
def without_kernels(device: torch.device) -> str | None:
    """Why no kernel runs on this GPU; None if they do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"the kernels need a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer"
    return None


@functools.cache
def _log_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)
