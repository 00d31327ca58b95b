"""Storage of keys, or of values, at one precision: packed words and metadata of ragged runs, and their exact bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from ib_kernels import bitpack, ragged
from numpy.typing import NDArray
from torch import Tensor

from ib_analysis.formats import FORMATS
from ib_analysis.formats.format import ITEM_BYTES, Format, MetadataRows, Quantizer

RAW_BITS = 16
RAW_DTYPES = (torch.float16, torch.bfloat16)

Count = TypeVar("Count", NDArray[np.int64], Tensor)


@dataclass(frozen=True)
class Codec:
    """One quantizer at one precision, for rows of `head_dim` channels.

    `bits` is 2, 3, 4, 8, or 16 for raw storage in `dtype`. Its output is a dictionary of parts: "words" [N, W], int16
    packed codes or 16-bit floats, and the quantizer's metadata by name.
    """

    quantizer: Quantizer
    bits: int
    head_dim: int
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.bits != RAW_BITS and self.bits not in bitpack.PLANES:
            raise ValueError(f"cannot store {self.bits} bits: use one of {[*bitpack.PLANES, RAW_BITS]}, 16 being raw")
        if self.dtype not in RAW_DTYPES:
            raise ValueError(f"cannot store full precision as {self.dtype}: pass torch.float16 or torch.bfloat16")
        if self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {self.head_dim}")

    def encode(self, x: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Parts of rows x fp32 [N, D], runs of lengths [P]."""
        return self._encode(x, lengths, self._fit(x, lengths))

    def decode(self, parts: dict[str, Tensor], lengths: Tensor) -> Tensor:
        """Rows fp32 [N, D] of parts."""
        if self.bits == RAW_BITS:
            return parts["words"].float()
        codes = bitpack.unpack(parts["words"], self.bits, self.head_dim)
        return self.quantizer.dequantize(codes, parts, lengths, self.bits)

    def roundtrip(self, x: Tensor, lengths: Tensor) -> Tensor:
        """decode(encode(x)) without packing the bits: rows fp32 [N, D]."""
        if self.bits == RAW_BITS:
            return _saturating(x, self.dtype).float()
        codes, metadata = self.quantizer.quantize(x, lengths, self.bits, self.quantizer.fit(x, lengths))
        return self.quantizer.dequantize(codes, metadata, lengths, self.bits)

    def append(self, parts: dict[str, Tensor], lengths: Tensor, x: Tensor, x_lengths: Tensor) -> dict[str, Tensor]:
        """Parts of every run followed by its new rows x fp32 [N_x, D].

        A run's incomplete last group is dequantized and quantized again together with its new rows.
        """
        complete = lengths - lengths % self._group_tokens  # [P]
        tail_lengths = lengths - complete
        heads, tails = self._split(parts, lengths, complete)
        tail = self.decode(tails, tail_lengths)
        added_lengths = tail_lengths + x_lengths
        added_rows = ragged.interleave(tail, tail_lengths, x, x_lengths)
        empty = (lengths == 0)[:, None]  # [P, 1]
        fitted = {name: torch.where(empty, new, parts[name]) for name, new in self._fit(x, x_lengths).items()}
        joined = self._encode(added_rows, added_lengths, fitted)
        for name, rows in self._layout.items():
            if rows.tokens_per_row > 0:
                head_count, added_count = _row_count(rows, complete), _row_count(rows, added_lengths)
                joined[name] = ragged.interleave(heads[name], head_count, joined[name], added_count)
        return joined

    def select(self, parts: dict[str, Tensor], lengths: Tensor, pairs: Tensor) -> dict[str, Tensor]:
        """Parts of the runs that `pairs` names."""
        return {name: ragged.select(parts[name], _row_count(rows, lengths), pairs)[0] for name, rows in self._layout.items()}

    def nbytes(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Exact bytes of the parts of one run, for each number of tokens."""
        total = np.zeros_like(tokens)
        for rows in self._layout.values():
            total = total + _row_count(rows, tokens) * (rows.width * ITEM_BYTES)
        return total

    @property
    def _layout(self) -> dict[str, MetadataRows]:
        if self.bits == RAW_BITS:
            return {"words": MetadataRows(self.head_dim)}
        words = MetadataRows(bitpack.words_per_token(self.head_dim, self.bits))
        return {"words": words, **self.quantizer.metadata(self.head_dim)}

    @property
    def _group_tokens(self) -> int:
        return max(1, *(rows.tokens_per_row for rows in self._layout.values()))

    def _fit(self, x: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        return {} if self.bits == RAW_BITS else self.quantizer.fit(x, lengths)

    def _encode(self, x: Tensor, lengths: Tensor, fitted: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.bits == RAW_BITS:
            return {"words": _saturating(x, self.dtype)}
        codes, metadata = self.quantizer.quantize(x, lengths, self.bits, fitted)
        return {"words": bitpack.pack(codes, self.bits), **metadata}

    def _split(self, parts: dict[str, Tensor], lengths: Tensor, complete: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        heads, tails = {}, {}
        for name, rows in self._layout.items():
            if rows.tokens_per_row == 0:
                heads[name] = tails[name] = parts[name]
            else:
                count, head_count = _row_count(rows, lengths), _row_count(rows, complete)
                heads[name], tails[name] = ragged.split(parts[name], count, head_count)
        return heads, tails


def codecs(format_name: str, head_dim: int, key_bits: int, value_bits: int, dtype: torch.dtype) -> tuple[Codec, Codec]:
    """The codecs of keys and of values. Raises ValueError for an unknown format, precision or dtype."""
    fmt = get_format(format_name)
    return Codec(fmt.keys, key_bits, head_dim, dtype), Codec(fmt.values, value_bits, head_dim, dtype)


def get_format(name: str) -> Format:
    """The format of that name. Raises ValueError if there is none."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: use one of {sorted(FORMATS)}")
    return FORMATS[name]


def _row_count(rows: MetadataRows, tokens: Count) -> Count:
    """How many rows of this part a run of `tokens` tokens has."""
    if rows.tokens_per_row == 0:
        return tokens * 0 + 1
    return (tokens + rows.tokens_per_row - 1) // rows.tokens_per_row


def _saturating(x: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)
