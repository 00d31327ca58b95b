"""What a storage format is: a quantizer for keys and one for values, and the tensors that each of them fills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from ib_kernels import bitpack
from torch import Tensor

FP16_MAX = 65504.0
ITEM_BYTES = 2  # words are int16 or 16-bit floats, metadata is fp16
RAW_BITS = 16
RAW_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class MetadataRows:
    """Shape of one tensor of a format: rows of `width` 16-bit numbers, one row for every `tokens_per_row` tokens of a run.

    The last row of a run may stand for fewer tokens. tokens_per_row = 0 means one row a run, whatever its length.
    """

    width: int
    tokens_per_row: int = 1


class Quantizer(Protocol):
    """Turns rows x [N, D] fp32, P consecutive runs of lengths [P], into codes and fp16 metadata, and back.

    Values beyond the fp16 range saturate; NaN stays NaN for all that shares its metadata. Codes and metadata of a row that
    was dequantized are those that it was dequantized from, so that a group can be completed later.
    """

    def metadata(self, head_dim: int) -> dict[str, MetadataRows]:
        """Name and shape of every metadata tensor."""
        ...

    def fit(self, x: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """The metadata that a run keeps from the first tokens it receives on: fp16 [P, width] each."""
        ...

    def quantize(self, x: Tensor, lengths: Tensor, bits: int, fitted: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes uint8 [N, D] in [0, 2**bits) and all metadata, `fitted` included."""
        ...

    def dequantize(self, codes: Tensor, metadata: dict[str, Tensor], lengths: Tensor, bits: int) -> Tensor:
        """The values fp32 [N, D] that codes and metadata stand for."""
        ...


@dataclass(frozen=True)
class Format:
    """A named pair of quantizers."""

    name: str
    keys: Quantizer
    values: Quantizer


def layout(quantizer: Quantizer, bits: int, head_dim: int) -> dict[str, MetadataRows]:
    """Name and shape of every tensor that holds keys, or values, at this precision; at 16 bits the numbers themselves."""
    if bits == RAW_BITS:
        return {"words": MetadataRows(head_dim)}
    return {"words": MetadataRows(bitpack.words_per_token(head_dim, bits)), **quantizer.metadata(head_dim)}


def saturating(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as fp16 or bf16, what is beyond its range as its largest number."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def check_precision(bits: int, raw_dtype: torch.dtype = torch.float16) -> None:
    """Raise ValueError unless keys or values can be stored at this precision."""
    if bits != RAW_BITS and bits not in bitpack.PLANES:
        raise ValueError(f"cannot store {bits} bits: use one of {[*bitpack.PLANES, RAW_BITS]}, 16 being raw")
    if raw_dtype not in RAW_DTYPES:
        raise ValueError(f"cannot store full precision as {raw_dtype}: pass torch.float16 or torch.bfloat16")
