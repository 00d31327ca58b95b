"""Time on a GPU, and the bandwidths that everything is compared with. On a CPU, for the smoke test, a clock and one call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

SAMPLES = 25
GRAPHS = 5
WORKING_SETS = 5.5  # what is read between two uses of the same bytes, in sizes of the last-level cache
STREAM_BYTES = 2**32
BLOCK = 4096  # numbers that a program of the read-only stream reads


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def copies_beyond_cache(nbytes: int) -> int:
    """How many different copies of `nbytes` to read in turn, so that none is still in the GPU's cache when its turn comes."""
    if not torch.cuda.is_available():
        return 1
    return max(1, -(-int(WORKING_SETS * torch.cuda.get_device_properties(0).L2_cache_size) // nbytes))


def graph_milliseconds(call: Callable[[], object]) -> list[float]:
    """Median time of a call in each of several CUDA graphs: how a graph comes to be scheduled can cost it a tenth."""
    if not torch.cuda.is_available():
        return [_clock_milliseconds(call)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles what is not compiled, and warms up
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return [_one_graph_milliseconds(call) for _ in range(GRAPHS)]


def _one_graph_milliseconds(call: Callable[[], object]) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return _event_milliseconds(graph.replay)


def call_milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call that cannot be captured, because it asks the GPU for a length."""
    if not torch.cuda.is_available():
        return _clock_milliseconds(call)
    return _event_milliseconds(call)


def _event_milliseconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    samples = []
    for _ in range(SAMPLES):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end))
    return statistics.median(samples)


def _clock_milliseconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def random_numbers(nbytes: int) -> Tensor:
    """int32 [nbytes / 4], whole blocks."""
    count = max(1, nbytes // (4 * BLOCK)) * BLOCK
    return torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32, device=device())


def read_stream(x: Tensor, largest: Tensor) -> None:
    """Read int32 x [n * BLOCK] once; the largest number of each block [n] is all that is written."""
    read_kernel[(largest.shape[0],)](x, largest, BLOCK, num_warps=8)


@triton.jit
def read_kernel(x, largest, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    tl.store(largest + block, tl.max(tl.load(x + block * BLOCK + tl.arange(0, BLOCK)), 0))
