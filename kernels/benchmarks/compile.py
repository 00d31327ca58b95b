"""Compile every variant of every kernel for GPUs that are not here, and show what their machine code uses.

    python kernels/benchmarks/compile.py [--capability 90] [--kernel attend] [--head-dim 128] [--bits 4] [--csv FILE]

Exits with 1 if a variant spills, uses more than 255 registers, lacks the matrix instructions or asynchronous copies that it
should have, or needs more instructions per element than its budget. Needs no GPU. All variants take some hours on a core;
with --csv each is written when it is done, and those that the file already has are not compiled again.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from ahead_of_time import Kind, MachineCode, compile_for
from ib_kernels import decoding_triton, merge_triton, quantize_triton, raw_attention_triton
from ib_kernels.formats import FORMATS
from ib_kernels.formats.kivi import kernels as kivi
from ib_kernels.formats.rotated import kernels as rotated
from ib_kernels.formats.rotated import rotation
from ib_kernels.formats.spectral import kernels as spectral
from ib_kernels.launch_table import Asked

CAPABILITIES = (80, 90, 100)
HEAD_DIMS = (128, 64, 96, 256)
BITS = (2, 3, 4, 8)
MAX_REGISTERS = 255
# Thread instructions per element of a cache of head_dim 128, for a GPU of 33.4e12 a second and 4.3e12 bytes a second.
# rotated at 4 and 2 bits: what one scale for many tokens would take; kivi: its metadata, a bit per element, allows more.
BUDGETS = {("rotated", 4): 4.1, ("rotated", 2): 2.2, ("kivi", 4): 4.9, ("kivi", 2): 4.9}

SIDE = decoding_triton.PackedSide("*i16", "*fp16", "*fp16")
STEPS = decoding_triton.PackedSide("*i16", "*i16", "*fp16")
TYPES: dict[str, Kind] = {
    **dict.fromkeys(("query", "keys", "values", "x"), "*bf16"),
    **dict.fromkeys(("shifts", "out", "lse", "partial", "partial_lse", "bias", "turned", "matrices"), "*fp32"),
    **dict.fromkeys(("scale", "minimum", "centre"), "*fp16"),
    "words": "*i16",
    **dict.fromkeys(("pairs", "items", "slots", "groups", "blocks", "lengths"), "*i32"),
    **dict.fromkeys(("mask", "rotated"), "*u8"),
    "rows": "*i64",
    "sums": "*fp64",
    **dict.fromkeys(("scaling", "softcap"), "fp32"),
    **dict.fromkeys(("R", "count", "heads", "window", "positions", "mask_stride", "pairs_per_sequence", "size", "length"), "i32"),
    "strides": ("i32:16",) * 3,
}


@dataclass(frozen=True)
class Variant:
    """One kernel with its constants, and what its machine code must show."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    launch: dict[str, Any]
    types: dict[str, Kind]
    elements: int = 0  # of keys and values, in one pass of the loop; 0 if it has no loop over them
    matrix: bool = False
    copies: bool = False
    budget: float | None = None


def attention_variants(capability: int, head_dim: int, fmt: str, key_bits: int, value_bits: int) -> Iterator[Variant]:
    """`attend_kernel` for few and for many query rows, for queries of 16 and (kivi) of 32 bits."""
    kernels = FORMATS[fmt].kernels
    assert kernels is not None
    dtypes = (torch.float32,) if kernels.rotates else (torch.bfloat16, torch.float32)
    keys = STEPS if kernels.scales == "quarters" else SIDE
    for many_rows, dtype, softcap in product((False, True), dtypes, (False, True)):
        precision = (head_dim, key_bits, value_bits)
        asked = Asked(kernels.scales, *precision, many_rows, dtype == torch.float32, softcap, capability)
        constants, launch = decoding_triton.variant(asked)
        if many_rows and constants["M"] == 8:
            continue
        plain = head_dim == 128 and not (many_rows or softcap) and dtype == dtypes[0]
        yield Variant(
            f"attend {fmt} k{key_bits} v{value_bits} d{head_dim} rows {constants['M']} {str(dtype)[6:]}{' softcap' * softcap}",
            decoding_triton.attend_kernel,
            constants | {"ASM": True},
            launch,
            TYPES | {"query": "*fp32" if dtype == torch.float32 else "*bf16", "keys": keys, "values": SIDE},
            2 * constants["N"] * head_dim,
            matrix=True,
            copies=launch["num_stages"] > 1,
            budget=BUDGETS.get((fmt, key_bits)) if plain and key_bits == value_bits else None,
        )


def packing_variants(head_dim: int, bits: int) -> Iterator[Variant]:
    """The kernels that pack and unpack one side of a cache."""
    constants = kivi.pack_constants(head_dim, bits)
    for kernel, x in product((kivi.pack_keys_kernel, kivi.pack_values_kernel), ("*bf16", "*fp32")):
        name = f"{kernel.__name__} kivi b{bits} d{head_dim} {x[1:]}"
        launch = kivi.pack_launch(head_dim, keys=kernel is kivi.pack_keys_kernel)
        yield Variant(name, kernel, constants, launch, TYPES | {"x": x}, 32 * head_dim, matrix=True)
    for side in ("keys", "values"):
        name = f"unpack_kernel kivi b{bits} d{head_dim} {side}"
        yield Variant(name, kivi.unpack_kernel, *kivi.unpack_variant(head_dim, bits, side == "keys"), TYPES, 32 * head_dim)
    for side in ("keys", "values"):
        constants = rotated.pack_constants(head_dim, bits, side == "keys")
        elements = constants["N"] * head_dim
        for x, dtype in (("*bf16", torch.bfloat16), ("*fp32", torch.float32)):
            name = f"pack_kernel rotated b{bits} d{head_dim} {side} {x[1:]}"
            launch = rotated.pack_launch(head_dim, bits, dtype)
            yield Variant(name, rotated.pack_kernel, constants, launch, TYPES | {"x": x}, elements)
        name = f"unpack_kernel rotated b{bits} d{head_dim} {side}"
        constants = rotated.unpack_constants(head_dim, bits, side == "keys")
        launch = rotated.pack_launch(head_dim, bits, torch.bfloat16)
        yield Variant(name, rotated.unpack_kernel, constants, launch, TYPES, elements)


def other_variants(head_dim: int) -> Iterator[Variant]:
    """Kernels that no precision enters."""
    types = TYPES | {"rotated": "*fp32"}
    constants = rotation.constants(head_dim)
    yield Variant(f"rotate_query_kernel d{head_dim}", rotation.rotate_query_kernel, constants, rotation.LAUNCH, types)
    for turns in (True, False):
        name = f"turn_query_kernel d{head_dim}{' as they are' * (not turns)}"
        yield Variant(name, spectral.turn_query_kernel, *spectral.query_variant(head_dim, turns), TYPES)
    if head_dim == HEAD_DIMS[0]:  # one for all of them
        yield Variant("blocks_kernel", quantize_triton.blocks_kernel, {}, {"num_warps": 4, "num_stages": 3}, TYPES)
    yield Variant(
        f"mean_kernel d{head_dim}",
        rotated.mean_kernel,
        rotated.mean_constants(head_dim),
        rotated.MEAN_LAUNCH,
        TYPES,
        32 * head_dim,
    )
    for bias, window, turned in product((False, True), repeat=3):
        constants, launch = merge_triton.variant(head_dim, bias, window, turned)
        flags = " bias" * bias + " window" * window + " rotated" * turned
        yield Variant(f"merge_kernel d{head_dim}{flags}", merge_triton.merge_kernel, constants, launch, TYPES, 32 * head_dim)
    for softcap, (window, mask), dtype in product(
        (False, True), ((False, False), (True, False), (True, True)), ("*bf16", "*fp16")
    ):
        constants, launch = raw_attention_triton.variant(head_dim, softcap, window, mask)
        types = TYPES | {"keys": dtype, "values": dtype}
        flags = " softcap" * softcap + " window" * window + " mask" * mask
        name = f"raw d{head_dim} {dtype[1:]}{flags}"
        elements = 2 * constants["N"] * head_dim
        yield Variant(name, raw_attention_triton.raw_kernel, constants, launch, types, elements, matrix=True)


def variants(capability: int, head_dim: int, bits: tuple[int, ...]) -> Iterator[Variant]:
    """What a cache of this head dimension and these precisions launches.

    Queries of fp16 stand for those of bf16 as well: they change no loop.
    """
    for fmt, key_bits, value_bits in product(FORMATS, bits, bits):
        yield from attention_variants(capability, head_dim, fmt, key_bits, value_bits)
    for some in bits:
        yield from packing_variants(head_dim, some)
    yield from other_variants(head_dim)


def faults(variant: Variant, code: MachineCode) -> list[str]:
    """What is wrong with the machine code of a variant; empty if nothing is."""
    found = []
    if code.spills:
        found.append(f"spills {code.stack_bytes + code.local_bytes} bytes")
    if code.registers > MAX_REGISTERS:
        found.append(f"{code.registers} registers")
    if variant.matrix and not code.matrix_instructions:
        found.append("no matrix instructions")
    if variant.copies and not code.asynchronous_copies:
        found.append("no asynchronous copies")
    if variant.budget is not None and code.instructions_per(variant.elements) > variant.budget:
        found.append(f"more than {variant.budget} instructions per element")
    return found


def row(variant: Variant, capability: int, code: MachineCode) -> dict[str, str]:
    """A line of the table."""
    return {
        "kernel": variant.name,
        "target": f"sm_{capability}",
        "registers": str(code.registers),
        "stack": str(code.stack_bytes),
        "shared": str(code.shared_bytes),
        "instructions/element": f"{code.instructions_per(variant.elements):.2f}" if variant.elements else "",
        "matrix": str(code.matrix_instructions),
        "copies": str(code.asynchronous_copies),
        "faults": "; ".join(faults(variant, code)),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, action="append")
    parser.add_argument("--kernel", default="", help="only variants whose name contains this")
    parser.add_argument("--head-dim", type=int, action="append")
    parser.add_argument("--bits", type=int, choices=BITS, action="append")
    parser.add_argument("--csv", type=Path)
    chosen = parser.parse_args(arguments)
    done = read(chosen.csv) if chosen.csv else []
    known = {(line["target"], line["kernel"]) for line in done}
    rows = []
    for head_dim in chosen.head_dim or HEAD_DIMS:
        for capability in chosen.capability or CAPABILITIES:
            for variant in variants(capability, head_dim, tuple(chosen.bits or BITS)):
                if chosen.kernel in variant.name and (f"sm_{capability}", variant.name) not in known:
                    code = compile_for(variant.kernel, variant.types, variant.constants, variant.launch, capability)
                    rows.append(row(variant, capability, code))
                    print(*rows[-1].values(), sep="  ", flush=True)
                    if chosen.csv:
                        append(chosen.csv, rows[-1])
    faulty = [line for line in done + rows if line["faults"]]
    print(f"{len(rows)} variants compiled, {len(done)} were in the table, {len(faulty)} have faults")
    for line in faulty:
        print(line["target"], line["kernel"], line["faults"], sep="  ")
    return 1 if faulty else 0


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a table that may not be there yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, line: dict[str, str]) -> None:
    """Add a line to a table, with the header if it is the first."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(line), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
