"""What a storage format is: a quantizer for keys and a quantizer for values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

FP16_MAX = 65504.0
ITEM_BYTES = 2  # words are int16 or 16-bit floats, metadata is fp16


@dataclass(frozen=True)
class MetadataRows:
    """Shape of one metadata tensor: rows of `width` fp16 numbers, one row for every `tokens_per_row` tokens of a run.

    The last row of a run may stand for fewer tokens. tokens_per_row = 0 means one row a run, whatever its length.
    """

    width: int
    tokens_per_row: int = 1


class Quantizer(Protocol):
    """Turns rows x [N, D] fp32, P consecutive runs of lengths [P], into codes and fp16 metadata, and back.

    Values beyond the fp16 range saturate; NaN stays NaN for all that shares its metadata.
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
