"""What a CUDA graph needs of an attention step: with a schedule at hand, nothing is read back from the GPU."""

import os

import pytest
import torch
from ib_kernels import Window, packed_attention, schedule
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")

READS_BACK = {"_local_scalar_dense", "item", "nonzero", "masked_select", "repeat_interleave", "_unique2", "unique_consecutive"}
ALLOCATES = {"empty", "zeros", "full"}  # Triton's interpreter copies what it reads: these copies are no part of a step


class Watch(TorchDispatchMode):
    """Operations on tensors, and how many elements each allocates."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        size = result.untyped_storage().nbytes() if isinstance(result, torch.Tensor) else 0
        self.found.append((function.overloadpacket.__name__, size))
        return result


def step_of(make_packed, lengths, window_tokens=9):
    parts = [make_packed("kivi", lengths, 32, 4, 2), make_packed("rotated", lengths[::-1], 32, 3, 8)]
    parts.append(make_packed("spectral", lengths, 32, 2, 4))
    keys, values = torch.randn(2, 2, window_tokens, 32)
    window = Window(keys, values, torch.ones(1, 2, window_tokens, dtype=torch.bool))
    query = torch.randn(2, 4, 32)
    return query, parts, window, schedule(parts, 2, query.device, items=6)


@pytest.mark.parametrize("lengths", [[65, 3], [0, 300]])
def test_a_step_reads_nothing_back(make_packed, lengths):
    query, parts, window, made = step_of(make_packed, lengths)
    with Watch() as watch:
        packed_attention(query, parts, window, 0.2, schedule=made, backend="triton")
    assert watch.found
    assert not {name for name, _ in watch.found} & READS_BACK


def test_a_step_allocates_the_same_whatever_the_lengths(make_packed):
    allocated = []
    for lengths in ([65, 3], [0, 300]):
        query, parts, window, made = step_of(make_packed, lengths)
        with Watch() as watch:
            packed_attention(query, parts, window, 0.2, schedule=made, backend="triton")
        allocated.append([size for name, size in watch.found if name in ALLOCATES])
    assert allocated[0]
    assert allocated[0] == allocated[1]
