"""One decode step's attention in one layer: packed tokens against SDPA and the flash kernels on bf16."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from ib_kernels import FORMATS, Bases, Packed, Window, get_format, packed_attention, quantize_pack, schedule
from results import Measured, NotRunError, Task
from timing import copies_beyond_cache, device, graph_milliseconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Case:
    """B sequences of T tokens, `heads` KV heads of D channels, `group` query heads to each, and a window at bf16."""

    batch: int
    context: int
    group: int
    heads: int = 8
    head_dim: int = 128
    window: int = 128

    def __str__(self) -> str:
        return f"batch {self.batch} context {self.context} group {self.group}"

    @property
    def pairs(self) -> int:
        return self.batch * self.heads

    @property
    def bf16_bytes(self) -> int:
        return 4 * self.pairs * self.context * self.head_dim


CASES = [Case(*sizes) for sizes in product((1, 8, 32), (4096, 32768, 131072), (1, 4, 8))]
SMOKE_CASES = [Case(1, 64, 4, heads=2, head_dim=16, window=16)]


def tasks(cases: list[Case]) -> Iterator[Task]:
    """Those with targets first."""
    for case in sorted(cases, key=lambda case: (case.group != 4, -case.context, case.batch)):
        yield Task("attention", str(case), "SDPA", partial(time_sdpa, case, None, False))
        for name, backend in BACKENDS.items():
            yield Task("attention", str(case), f"SDPA {name}", partial(time_sdpa, case, backend, False))
            yield Task("attention", str(case), f"SDPA {name}, grouped heads as rows", partial(time_sdpa, case, backend, True))
        for package in ("flash_attn_interface", "flash_attn"):
            yield Task("attention", str(case), package, partial(time_flash_attn, case, package))
        for fmt, bits, skewed in product(FORMATS, (4, 2), (False, True)):
            method = f"{fmt} {bits} bits{' skewed' * skewed}"
            yield Task("attention", str(case), method, partial(time_packed, case, fmt, bits, skewed))


def time_packed(case: Case, fmt: str, bits: int, skewed: bool) -> Measured:
    """Attention to packed tokens and a window: all that a step launches in a layer."""
    check_memory(3 * case.bf16_bytes)
    torch.manual_seed(0)
    lengths = run_lengths(case, skewed)
    packed = [random_packed(case, lengths, fmt, bits)]
    window = random_window(case)
    nbytes = packed_bytes(packed[0]) + sum(x.nbytes for x in (window.keys, window.values))
    packed += [random_packed(case, lengths, fmt, bits) for _ in range(copies_beyond_cache(nbytes) - 1)]
    made = schedule(packed[0:1], case.pairs, device(), rows=case.group)
    query = torch.randn(case.pairs, case.group, case.head_dim, dtype=torch.bfloat16, device=device())

    def call() -> None:
        for layer in packed:
            packed_attention(query, [layer], window, case.head_dim**-0.5, schedule=made, backend="triton")

    return Measured.of_graphs(graph_milliseconds(call), len(packed), nbytes)


def run_lengths(case: Case, skewed: bool) -> Tensor:
    """Tokens of each (sequence, head), int32 [pairs]: equal, or half as many in each head as in the one before; equal sums."""
    if not skewed:
        return torch.full((case.pairs,), case.context, dtype=torch.int32, device=device())
    shares = 0.5 ** torch.arange(case.heads, dtype=torch.float64)
    lengths = (shares / shares.sum() * (case.heads * case.context) / 32).floor().long() * 32
    lengths[0] += case.heads * case.context - lengths.sum()
    return lengths.to(torch.int32).repeat(case.batch).to(device())


def random_packed(case: Case, lengths: Tensor, fmt: str, bits: int) -> Packed:
    tokens = case.pairs * case.context
    keys, values = (torch.randn(1, 1, tokens, case.head_dim, dtype=torch.bfloat16, device=device()) for _ in range(2))
    pairs = torch.arange(case.pairs, dtype=torch.int32, device=device())
    rows, bases = torch.arange(tokens, device=device()), random_bases(fmt, case.heads, case.head_dim)
    return quantize_pack(fmt, keys, values, rows, lengths, pairs, bits, bits, bases=bases)


def random_bases(fmt: str, heads: int, head_dim: int) -> Bases | None:
    """Rotations, for a format that stores keys in them."""
    if not get_format(fmt).turns_keys:
        return None
    turns = torch.linalg.qr(torch.randn(heads, head_dim, head_dim, generator=torch.Generator().manual_seed(0)))[0]
    return Bases(turns, turns.mT.contiguous()).to(device())


def random_window(case: Case) -> Window:
    shape = (case.pairs, case.window, case.head_dim)
    return Window(*(torch.randn(shape, dtype=torch.bfloat16, device=device()) for _ in range(2)))


def packed_bytes(packed: Packed) -> int:
    return sum(tensor.nbytes for side in (packed.keys, packed.values) for tensor in side.values())


def time_sdpa(case: Case, backend: SDPBackend | None, rows: bool) -> Measured:
    """SDPA on bf16, with the given or else PyTorch's choice of a backend.

    Args:
        rows: the query heads of a group as query positions of one head, which all backends take without repeating keys.
    """
    layers = random_layers(case, (case.batch, case.heads, case.context, case.head_dim))
    heads, length = (case.heads, case.group) if rows else (case.heads * case.group, 1)
    query = torch.randn(case.batch, heads, length, case.head_dim, dtype=torch.bfloat16, device=device())
    grouped = not rows and case.group > 1

    def call() -> None:
        for keys, values in layers:
            scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)

    if backend is None:
        return Measured.of_graphs(graph_milliseconds(call), len(layers), case.bf16_bytes)
    if not torch.cuda.is_available():
        raise NotRunError("needs a CUDA GPU")
    try:
        with sdpa_kernel(backend):
            return Measured.of_graphs(graph_milliseconds(call), len(layers), case.bf16_bytes)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise NotRunError(f"not available: {error}") from error


def time_flash_attn(case: Case, package: str) -> Measured:
    """flash_attn_with_kvcache of FlashAttention 2 or 3, which splits the tokens among cores as a decode step needs."""
    try:
        flash = importlib.import_module(package).flash_attn_with_kvcache
    except ImportError:
        raise NotRunError(f"{package} is not installed") from None
    layers = random_layers(case, (case.batch, case.context, case.heads, case.head_dim))
    query = torch.randn(case.batch, 1, case.heads * case.group, case.head_dim, dtype=torch.bfloat16, device=device())

    def call() -> None:
        for keys, values in layers:
            flash(query, keys, values)

    return Measured.of_graphs(graph_milliseconds(call), len(layers), case.bf16_bytes)


def random_layers(case: Case, shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of as many layers as it takes not to find one in the GPU's cache."""
    copies = copies_beyond_cache(case.bf16_bytes)
    check_memory(copies * case.bf16_bytes)
    torch.manual_seed(0)
    some = [torch.randn(shape, dtype=torch.bfloat16, device=device()) for _ in range(2 * copies)]
    return list(zip(some[::2], some[1::2]))


def check_memory(nbytes: int) -> None:
    """Raise NotRunError if the GPU has no room for as much."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if nbytes > 0.9 * free:
            raise NotRunError(f"needs {nbytes / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
