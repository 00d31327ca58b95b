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
from ib_kernels.formats import get_format
from ib_kernels.formats.format import RAW_BITS

Backend = Literal["triton", "reference"]
BACKENDS = ("triton", "reference")
Form = tuple[str, int, int]  # format, key bits, value bits
VARIABLE = "IB_KERNELS"
CAPABILITY = 8, 0  # of the oldest GPUs that the kernels are compiled for
MAX_CHANNELS = 256


def pick_backend(device: torch.device, head_dim: int, forms: Iterable[Form]) -> Backend:
    """What runs on this device: on a GPU plain torch if there is no kernel for some tokens, which is logged once.

    Args:
        device: where the tokens are.
        head_dim: their channels.
        forms: those of all of them.
    """
    forms = list(forms)
    if device.type == "cuda" and VARIABLE not in os.environ:
        for reason in (without_kernels(device), *(without_kernel(head_dim, *form) for form in forms)):
            if reason is not None:
                return _plain_torch(reason)
    return backend_of(device, forms)


def backend_of(device: torch.device, forms: Iterable[Form], backend: Backend | None = None) -> Backend:
    """`backend`, by default that of the device; plain torch if the format of some tokens has no kernels, logged once."""
    chosen = default_backend(device) if backend is None else backend
    if chosen == "triton":
        for fmt, *bits in forms:
            if min(bits) != RAW_BITS and get_format(fmt).kernels is None:
                return _plain_torch(_no_kernels(fmt))
    return chosen


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
    if head_dim % 16 or not 16 <= head_dim <= MAX_CHANNELS:
        return f"the GPU kernels need a head_dim that is a multiple of 16 up to {MAX_CHANNELS}, got {head_dim}"
    if (key_bits == RAW_BITS) != (value_bits == RAW_BITS):
        return f"the GPU kernels have no keys of {key_bits} with values of {value_bits} bits: pack both, or leave both at 16 bits"
    if key_bits != RAW_BITS and get_format(fmt).kernels is None:
        return _no_kernels(fmt)
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


def _no_kernels(fmt: str) -> str:
    return f"the format {fmt!r} has no kernels"


@functools.cache  # so that it is said once
def _plain_torch(reason: str) -> Backend:
    logging.getLogger(__name__).warning("compressed tokens are handled in plain PyTorch, which is slower: %s", reason)
    return "reference"
