"""Before anything is timed: the kernels give what the plain functions give, with and without inline assembly."""

from __future__ import annotations

from itertools import product

import torch
from attention_speed import random_bases
from ib_kernels import FORMATS, Packed, Window, decoding_triton, packed_attention, quantize_pack, unpack_tokens
from timing import device
from torch import Tensor

RELATIVE_L2, LOG_SUM_EXP = 3e-3, 2e-4


def differences(head_dim: int, lengths: list[int]) -> list[str]:
    """What is wrong, for each format and precision that is timed; empty if nothing is."""
    found = []
    for fmt, bits, group in product(FORMATS, (4, 2), (4, 1)):
        name = f"{fmt} {bits} bits, {group} query heads: "
        on_cpu, packed = packed_twice(fmt, bits, head_dim, lengths)
        sides = ((on_cpu.keys, packed.keys), (on_cpu.values, packed.values))
        if not all(same_bits(plain[name], kernels[name]) for plain, kernels in sides for name in plain):
            found.append(name + "packed bits differ from those of the plain functions")
        unpacked = zip(unpack_tokens(on_cpu, "reference"), unpack_tokens(packed, "triton"))
        if not all(same_bits(plain, kernels) for plain, kernels in unpacked):
            found.append(name + "unpacked tokens differ from those of the plain functions")
        found += [name + text for text in attention_differences(on_cpu, packed, group)]
    return found


def packed_twice(fmt: str, bits: int, head_dim: int, lengths: list[int]) -> tuple[Packed, Packed]:
    """Random tokens with outliers, packed by the plain functions on the CPU and by the kernels."""
    generator = torch.Generator().manual_seed(bits)
    keys, values = torch.randn(2, 1, 1, sum(lengths), head_dim, generator=generator).to(torch.bfloat16)
    keys[..., 5] *= 200
    rows, counts = torch.arange(sum(lengths)), torch.tensor(lengths, dtype=torch.int32)
    pairs = torch.arange(len(lengths), dtype=torch.int32)
    bases = random_bases(fmt, len(lengths), head_dim)
    arguments = (fmt, keys, values, rows, counts, pairs, bits, bits)
    on_cpu = quantize_pack(*arguments, backend="reference", bases=bases and bases.to("cpu"))
    keys, values, rows, counts, pairs = (x.to(device()) for x in (keys, values, rows, counts, pairs))
    return on_cpu, quantize_pack(fmt, keys, values, rows, counts, pairs, bits, bits, bases=bases, backend="triton")


def attention_differences(on_cpu: Packed, packed: Packed, group: int) -> list[str]:
    pairs, head_dim = on_cpu.pairs.shape[0], on_cpu.head_dim
    generator = torch.Generator().manual_seed(group)
    query = torch.randn(pairs, group, head_dim, generator=generator).to(torch.bfloat16)
    window = Window(*torch.randn(2, pairs, 40, head_dim, generator=generator).to(torch.bfloat16))
    moved = Window(window.keys.to(device()), window.values.to(device()))
    out, lse = packed_attention(query.to(device()), [packed], moved, head_dim**-0.5, backend="triton")
    expected, expected_lse = packed_attention(query, [on_cpu], window, head_dim**-0.5, backend="reference")
    found = []
    error = ((out.cpu() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    if not error <= RELATIVE_L2:
        found.append(f"the output differs by {error:.1e} of its norm")
    error = (lse.cpu() - expected_lse).abs().max().item()
    if not error <= LOG_SUM_EXP:
        found.append(f"the log-sum-exp differs by {error:.1e}")
    if torch.cuda.is_available():
        assembly, decoding_triton.ASSEMBLY = decoding_triton.ASSEMBLY, False
        plain_out, plain_lse = packed_attention(query.to(device()), [packed], moved, head_dim**-0.5, backend="triton")
        decoding_triton.ASSEMBLY = assembly
        if not (torch.equal(out, plain_out) and torch.equal(lse, plain_lse)):
            found.append("inline assembly changes bits")
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.cpu().view(torch.int16))
