"""Packed tokens of ragged runs, as the kernels read them, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ib_kernels import bitpack
from ib_kernels.backends import Backend, check_kernel, default_backend
from ib_kernels.formats import get_format
from ib_kernels.quantizer import RAW_BITS, MetadataRows, Quantizer, layout
from torch import Tensor

WORD_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # at 16 bits; a cache has no fp32


@dataclass(frozen=True)
class Packed:
    """Keys and values of N tokens in P consecutive runs, at one format, key precision and value precision.

    Attributes:
        format: a name in FORMATS; without meaning at 16 bits.
        key_bits, value_bits: 2, 3, 4, 8, or 16, "words" then being the numbers themselves, fp16 or bf16 [N, D]. The kernels
            have 16 bits for both or for none.
        keys: "words" int16 [N, words_per_token] (see `bitpack`), and for
            kivi "scale", "minimum" fp16 [G, D], a row for each group of 32 tokens of a run, of which the last may be short;
            rotated "scale" fp16 [N, 1], "centre" fp16 [P, D].
        values: "words" as for keys, and for kivi "scale", "minimum" fp16 [N, ceil(D / 32)]; rotated "scale" fp16 [N, 1].
        lengths: int32 [P], tokens of each run, 0 allowed.
        pairs: int32 [P], the (sequence, KV head) pair that each run belongs to.
    """

    format: str
    key_bits: int
    value_bits: int
    head_dim: int
    keys: dict[str, Tensor]
    values: dict[str, Tensor]
    lengths: Tensor
    pairs: Tensor

    def __post_init__(self) -> None:
        fmt = get_format(self.format)
        key_shapes = layout(fmt.keys, self.key_bits, self.head_dim)
        value_shapes = layout(fmt.values, self.value_bits, self.head_dim)
        if self.keys.keys() != key_shapes.keys() or self.values.keys() != value_shapes.keys():
            raise ValueError(
                f"keys of {self.key_bits} and values of {self.value_bits} bits have {list(key_shapes)} and {list(value_shapes)}, "
                f"got {list(self.keys)} and {list(self.values)}"
            )
        tokens, others = self.keys["words"].shape[0], self.values["words"].shape[0]
        if tokens != others:
            raise ValueError(f"there are {tokens} keys, but {others} values")
        _check_side("keys", self.keys, key_shapes, self.key_bits, self.lengths.shape[0])
        _check_side("values", self.values, value_shapes, self.value_bits, self.lengths.shape[0])
        if self.lengths.dtype != torch.int32 or self.pairs.dtype != torch.int32 or self.lengths.shape != self.pairs.shape:
            raise ValueError(
                f"lengths and pairs must be int32 [P], got {self.lengths.dtype} {list(self.lengths.shape)} "
                f"and {self.pairs.dtype} {list(self.pairs.shape)}"
            )

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*self.keys.values(), *self.values.values(), self.lengths, self.pairs]


def unpack_tokens(packed: Packed, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values fp32 [N, D] that `packed` stands for; `backend` is by default that of the device."""
    backend = default_backend(packed.lengths.device) if backend is None else backend
    if backend == "triton" and packed.key_bits != RAW_BITS and packed.value_bits != RAW_BITS:
        return unpack_tokens_triton(packed)
    return unpack_tokens_reference(packed)


@torch.no_grad()
def unpack_tokens_reference(packed: Packed) -> tuple[Tensor, Tensor]:
    """`unpack_tokens` in plain torch."""
    fmt = get_format(packed.format)
    return (
        _unpack(fmt.keys, packed.keys, packed.lengths, packed.key_bits, packed.head_dim),
        _unpack(fmt.values, packed.values, packed.lengths, packed.value_bits, packed.head_dim),
    )


def unpack_tokens_triton(packed: Packed) -> tuple[Tensor, Tensor]:
    """`unpack_tokens` by the kernels, for 2, 3, 4 or 8 bits. Raises ValueError for tokens they do not take."""
    from ib_kernels import kivi_triton, rotated_triton

    check_kernel(packed.head_dim, packed.format, packed.key_bits, packed.value_bits)
    if not all(tensor.is_contiguous() for tensor in packed.tensors):
        raise ValueError("the GPU kernels need contiguous tensors: call .contiguous() on the tensors of a packed part")
    sides = ((packed.keys, packed.key_bits, True), (packed.values, packed.value_bits, False))
    with torch.cuda.device_of(packed.lengths):  # Triton launches on the current GPU
        if packed.format == "kivi":
            keys, values = (kivi_triton.unpack(part, packed.lengths, packed.head_dim, bits, k) for part, bits, k in sides)
        else:
            keys, values = (rotated_triton.unpack(part, packed.lengths, packed.head_dim, bits) for part, bits, _ in sides)
    return keys, values


def _unpack(quantizer: Quantizer, part: dict[str, Tensor], lengths: Tensor, bits: int, head_dim: int) -> Tensor:
    if bits == RAW_BITS:
        return part["words"].float()
    return quantizer.dequantize(bitpack.unpack(part["words"], bits, head_dim), part, lengths, bits)


def _check_side(side: str, part: dict[str, Tensor], shapes: dict[str, MetadataRows], bits: int, runs: int) -> None:
    """Shapes and dtypes: the kernels compute addresses from them."""
    groups = [part[name].shape[0] for name, rows in shapes.items() if rows.tokens_per_row > 1]
    for name, rows in shapes.items():
        count = {0: runs, 1: part["words"].shape[0]}.get(rows.tokens_per_row, max(groups, default=0))
        dtypes = (torch.float16,) if name != "words" else (torch.int16,) if bits != RAW_BITS else WORD_DTYPES
        if part[name].shape != (count, rows.width) or part[name].dtype not in dtypes:
            raise ValueError(
                f"the {side} {name} of {bits} bits must be {list(dtypes)} [{count}, {rows.width}], "
                f"got {part[name].dtype} {list(part[name].shape)}"
            )
