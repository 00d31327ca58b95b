"""Packed tokens of ragged runs, as the kernels read them, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ib_kernels import bitpack, kivi, ragged, rotated
from torch import Tensor

FORMATS = ("kivi", "rotated")
RAW_BITS = 16


@dataclass(frozen=True)
class Packed:
    """Keys and values of N tokens in P consecutive runs, at one format, key precision and value precision.

    Attributes:
        format: "kivi" or "rotated"; without meaning at 16 bits.
        key_bits, value_bits: 2, 3, 4 or 8; or both 16, "words" then being the numbers themselves, fp16 or bf16 [N, D].
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
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}: use one of {list(FORMATS)}")
        for name, part, bits in (("keys", self.keys, self.key_bits), ("values", self.values, self.value_bits)):
            width = self.head_dim if bits == RAW_BITS else bitpack.words_per_token(self.head_dim, bits)
            words = part["words"]
            if words.ndim != 2 or words.shape[1] != width or (words.dtype == torch.int16) != (bits != RAW_BITS):
                raise ValueError(
                    f"{name} of {bits} bits and head_dim {self.head_dim} need {width} words a token, "
                    f"got {words.dtype} {list(words.shape)}"
                )
        if self.lengths.dtype != torch.int32 or self.pairs.dtype != torch.int32 or self.lengths.shape != self.pairs.shape:
            raise ValueError(
                f"lengths and pairs must be int32 [P], got {self.lengths.dtype} {list(self.lengths.shape)} "
                f"and {self.pairs.dtype} {list(self.pairs.shape)}"
            )


def unpack_tokens(packed: Packed) -> tuple[Tensor, Tensor]:
    """Keys and values fp32 [N, D] that `packed` stands for."""
    if packed.lengths.is_cuda and packed.key_bits != RAW_BITS and packed.value_bits != RAW_BITS:
        return unpack_tokens_triton(packed)
    return unpack_tokens_reference(packed)


def unpack_tokens_reference(packed: Packed) -> tuple[Tensor, Tensor]:
    """`unpack_tokens` in plain torch."""
    return _unpack_keys(packed), _unpack_values(packed)


def unpack_tokens_triton(packed: Packed) -> tuple[Tensor, Tensor]:
    """`unpack_tokens` by the kernels, for 2, 3, 4 or 8 bits. Raises ValueError for a head_dim they do not take."""
    from ib_kernels import kivi_triton, rotated_triton

    check_head_dim(packed.head_dim)
    sides = ((packed.keys, packed.key_bits, True), (packed.values, packed.value_bits, False))
    if packed.format == "kivi":
        keys, values = (kivi_triton.unpack(part, packed.lengths, packed.head_dim, bits, k) for part, bits, k in sides)
    else:
        keys, values = (rotated_triton.unpack(part, packed.lengths, packed.head_dim, bits) for part, bits, _ in sides)
    return keys, values


def check_head_dim(head_dim: int) -> None:
    """Raise ValueError unless the kernels take this head_dim."""
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise ValueError(f"the GPU kernels need a head_dim that is a multiple of 16 up to 256, got {head_dim}")


def _unpack_keys(packed: Packed) -> Tensor:
    if packed.key_bits == RAW_BITS:
        return packed.keys["words"].float()
    codes = bitpack.unpack(packed.keys["words"], packed.key_bits, packed.head_dim)
    if packed.format == "kivi":
        return kivi.dequantize_keys(codes, packed.keys, packed.lengths)
    return rotated.dequantize_keys(codes, packed.keys, packed.lengths, packed.key_bits)


def _unpack_values(packed: Packed) -> Tensor:
    if packed.value_bits == RAW_BITS:
        return packed.values["words"].float()
    codes = bitpack.unpack(packed.values["words"], packed.value_bits, packed.head_dim)
    if packed.format == "kivi":
        return kivi.dequantize_values(codes, packed.values)
    return rotated.dequantize_values(codes, packed.values, packed.value_bits)


def check(packed: Packed) -> None:
    """Raise ValueError if the lengths do not add up to the tokens held. Reads the lengths, so a GPU has to catch up."""
    ragged.check(packed.keys["words"], packed.lengths)
