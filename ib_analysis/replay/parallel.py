"""Several prompts at the same time: small operations gain more from a processor core each than from sharing all cores."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn

from ib_analysis.model.devices import is_dispatched

MAX_AT_ONCE = 4  # prompts: each needs memory of its own
DYNAMIC_ROPE = ("dynamic", "longrope")  # types that set the frequencies of the whole model by the length of the last prompt

Item = TypeVar("Item")
Result = TypeVar("Result")


def prompts_at_once(model: nn.Module, device: torch.device) -> int:
    """How many prompts a model may read at a time: one on a GPU, and where one would disturb another."""
    ropes = " ".join(str(getattr(module, "rope_type", "")) for module in model.modules())
    if device.type != "cpu" or is_dispatched(model) or any(name in ropes for name in DYNAMIC_ROPE):
        return 1
    return min(torch.get_num_threads(), MAX_AT_ONCE)


def in_order(function: Callable[[Item], Result], items: Sequence[Item], at_once: int) -> Generator[Result, None, None]:
    """function(item) for each item, in their order, computed `at_once` at a time, with one core each if it is more than one."""
    if min(at_once, len(items)) <= 1:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(function, items)
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        finally:  # a second interrupt ends the wait
            torch.set_num_threads(threads)  # parts of PyTorch know but one number for all threads


def give_back_freed() -> None:
    """Hands memory that was freed back to the system: glibc keeps it for each thread, gigabytes after a few large prompts."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)
