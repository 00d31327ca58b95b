"""Memory around every tensor that a kernel reads or writes is poisoned: a stray access shows."""

import pytest
import torch
from ib_kernels import Packed, Window

GUARD = 64


def poison(dtype):
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def guarded(tensor):
    """A contiguous copy of `tensor` between two stretches of poison."""
    around = torch.full((tensor.numel() + 2 * GUARD,), poison(tensor.dtype), dtype=tensor.dtype)
    inside = around[GUARD : GUARD + tensor.numel()]
    inside.copy_(tensor.reshape(-1))
    return inside.view(tensor.shape)


@pytest.fixture
def guard():
    """Copies a packed part, a window or a tensor into poisoned surroundings."""

    def copy(held):
        if isinstance(held, Packed):
            parts = [{name: guarded(part) for name, part in side.items()} for side in (held.keys, held.values)]
            return Packed(
                held.format,
                held.key_bits,
                held.value_bits,
                held.head_dim,
                *parts,
                guarded(held.lengths),
                guarded(held.pairs),
            )
        if isinstance(held, Window):
            return Window(guarded(held.keys), guarded(held.values), held.mask)
        return guarded(held)

    return copy


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """`torch.empty` gives poison between two more stretches of it, which must still be there at the end."""
    allocated = []

    def empty(*shape, dtype=torch.float32, device=None):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        numel = torch.Size(shape).numel()
        around = torch.full((numel + 2 * GUARD,), poison(dtype), dtype=dtype)
        allocated.append((around, numel))
        return around[GUARD : GUARD + numel].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
    for around, numel in allocated:
        edges = torch.cat([around[:GUARD], around[GUARD + numel :]])
        assert (edges.isnan() if edges.is_floating_point() else edges == poison(edges.dtype)).all(), "written out of bounds"
