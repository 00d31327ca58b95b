"""Quantize-and-pack, the gather of kept tokens included, against a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from attention_speed import check_memory, packed_bytes, random_bases
from ib_kernels import FORMATS, quantize_pack
from results import Measured, Task
from timing import call_milliseconds, device
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Keys and values [B, heads, T, D] in bf16, of which every `stride`-th token is kept."""

    batch: int
    context: int
    stride: int
    heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        return f"batch {self.batch} context {self.context} kept 1/{self.stride}"


CASES = [Case(*sizes) for sizes in ((8, 131072, 1), (8, 131072, 4), (1, 131072, 1), (1, 32768, 1))]
SMOKE_CASES = [Case(2, 64, 2, heads=2, head_dim=16)]


def tasks(cases: list[Case]) -> Iterator[Task]:
    for case in cases:
        yield Task("packing", str(case), "copy", partial(time_copy, case))
        for fmt, bits in product(FORMATS, (4, 2)):
            yield Task("packing", str(case), f"{fmt} {bits} bits", partial(time_packing, case, fmt, bits))


def time_packing(case: Case, fmt: str, bits: int) -> Measured:
    """The whole call, what it asks of the CPU included: it is made once a prompt and once a flush, not once a step."""
    keys, values = random_cache(case)
    rows = torch.arange(0, keys.shape[:3].numel(), case.stride, device=device())
    pairs = torch.arange(case.batch * case.heads, dtype=torch.int32, device=device())
    lengths = torch.full_like(pairs, case.context // case.stride)
    arguments = (fmt, keys, values, rows, lengths, pairs, bits, bits)
    bases = random_bases(fmt, case.heads, case.head_dim)
    call = partial(quantize_pack, *arguments, backend="triton", bases=bases)
    kept_bytes = rows.shape[0] * 2 * keys.shape[3] * keys.element_size()
    return Measured(call_milliseconds(call), kept_bytes + packed_bytes(call()))


def time_copy(case: Case) -> Measured:
    """A copy of all keys and values."""
    keys, values = random_cache(case)
    to = torch.empty_like(keys), torch.empty_like(values)

    def call() -> None:
        to[0].copy_(keys)
        to[1].copy_(values)

    return Measured(call_milliseconds(call), 2 * (keys.nbytes + values.nbytes))


def random_cache(case: Case) -> tuple[Tensor, Tensor]:
    shape = (case.batch, case.heads, case.context, case.head_dim)
    check_memory(6 * 2 * case.batch * case.heads * case.context * case.head_dim)
    torch.manual_seed(0)
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=device()) for _ in range(2))
    return keys, values
