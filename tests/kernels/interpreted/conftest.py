"""Where the kernels run, and poison around every tensor that they read or write: a stray access shows.

Under Triton's interpreter tensors are on the CPU; without it, on a GPU, and there are more cases then.
"""

import os
from dataclasses import replace

import pytest
import torch
from ib_kernels import Packed, Window, schedule
from ib_kernels.bases import Bases
from ib_kernels.decoding import packed_attention_triton

GUARD = 64


@pytest.fixture
def device():
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def poison(dtype):
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def guarded(tensor, device):
    """A contiguous copy of `tensor` on the device, between two stretches of poison."""
    around = torch.full((tensor.numel() + 2 * GUARD,), poison(tensor.dtype), dtype=tensor.dtype, device=device)
    inside = around[GUARD : GUARD + tensor.numel()]
    inside.copy_(tensor.reshape(-1))
    return inside.view(tensor.shape)


@pytest.fixture
def guard(device):
    """Copies a packed part, a window or a tensor into poisoned surroundings on the device."""

    def copy(held):
        if isinstance(held, Packed):
            keys, values = ({name: guarded(tensor, device) for name, tensor in side.items()} for side in (held.keys, held.values))
            lengths, pairs = guarded(held.lengths, device), guarded(held.pairs, device)
            bases = held.bases and Bases(*(guarded(matrices, device) for matrices in held.bases))
            return replace(held, keys=keys, values=values, lengths=lengths, pairs=pairs, bases=bases)
        if isinstance(held, Window):
            mask = None if held.mask is None else held.mask.to(device)
            return Window(guarded(held.keys, device), guarded(held.values, device), mask)
        return None if held is None else guarded(held, device)

    return copy


@pytest.fixture
def attend(guard, device):
    """`packed_attention_triton` of guarded copies, in `items` work items if given; its results on the CPU."""

    def run(query, parts, window, scaling, softcap=None, bias=None, items=None):
        parts = [guard(part) for part in parts]
        made = None if items is None else schedule(parts, query.shape[0], device, items)
        result = packed_attention_triton(guard(query), parts, guard(window), scaling, softcap, guard(bias), made)
        return tuple(x.cpu() for x in result)

    return run


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """`torch.empty` gives poison between two more stretches of it, which must still be there at the end."""
    allocated = []

    def empty(*shape, dtype=torch.float32, device=None):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        numel = torch.Size(shape).numel()
        around = torch.full((numel + 2 * GUARD,), poison(dtype), dtype=dtype, device=device)
        allocated.append((around, numel))
        return around[GUARD : GUARD + numel].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
    for around, numel in allocated:
        edges = torch.cat([around[:GUARD], around[GUARD + numel :]])
        assert (edges.isnan() if edges.is_floating_point() else edges == poison(edges.dtype)).all(), "written out of bounds"
