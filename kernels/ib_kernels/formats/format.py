"""What a storage format is: a quantizer for keys and one for values, the tensors that each of them fills, and its kernels."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from ib_kernels import bitpack
from ib_kernels.bases import Bases
from numpy.typing import NDArray
from torch import Tensor

FP16_MAX = 65504.0
ITEM_BYTES = 2  # words are int16 or 16-bit floats, metadata is fp16 or int16
RAW_BITS = 16
RAW_DTYPES = (torch.float16, torch.bfloat16)

Side = dict[str, Tensor]  # the tensors of keys, or of values, by name
SideName = Literal["keys", "values"]
Scales = Literal["groups", "tokens", "quarters"]
Bits = tuple[int, int]  # of keys and of values
Count = TypeVar("Count", int, NDArray[np.int64], Tensor)


class Sides(NamedTuple):
    """Tensors of keys, and tensors of values."""

    keys: Side
    values: Side


@dataclass(frozen=True)
class MetadataRows:
    """Shape of one tensor of a format: rows of `width` 16-bit numbers, one row for every `tokens_per_row` tokens of a run.

    The last row of a run may stand for fewer tokens. tokens_per_row = 0 means one row a run, whatever its length: what is
    fitted once, which is fp16.
    """

    width: int
    tokens_per_row: int = 1
    dtype: torch.dtype = torch.float16  # or int16


class Quantizer(Protocol):
    """Turns rows x [N, D] fp32, P consecutive runs of lengths [P], into codes and 16-bit metadata, and back.

    Values beyond the fp16 range saturate; NaN stays NaN for all that shares its metadata. Codes and metadata of a row that
    was dequantized are those that it was dequantized from, so that a group can be completed later.
    """

    def metadata(self, head_dim: int) -> dict[str, MetadataRows]:
        """Name and shape of every metadata tensor."""
        ...

    def fit(self, x: Tensor, lengths: Tensor) -> Side:
        """The metadata of one row a run, which a run keeps from the first tokens it receives on: fp16 [P, width] each."""
        ...

    def quantize(self, x: Tensor, lengths: Tensor, bits: int, fitted: Side) -> tuple[Tensor, Side]:
        """Codes uint8 [N, D] in [0, 2**bits) and all metadata, `fitted` included."""
        ...

    def dequantize(self, codes: Tensor, metadata: Side, lengths: Tensor, bits: int) -> Tensor:
        """The values fp32 [N, D] that codes and metadata stand for."""
        ...


class KernelModule(Protocol):
    """What the module with a format's kernels offers. Tensors and arguments are those of `quantize_pack` and `Packed`."""

    def pack(
        self, name: SideName, x: Tensor, rows: Tensor, lengths: Tensor, counts: list[int], bits: int, fitted: Side | None
    ) -> Side:
        """One packed side of runs of `lengths`, which are `counts` on the CPU; what is not `fitted` is fitted here."""
        ...

    def unpack(self, name: SideName, side: Side, lengths: Tensor, head_dim: int, bits: int) -> Tensor:
        """Rows fp32 [N, D] of one packed side."""
        ...

    def queries(self, keys: Side, pairs: Tensor, query: Tensor, bases: Bases | None) -> tuple[Tensor, Tensor]:
        """Query rows and shifts as `decoding_triton.attend` takes them, from query [pairs, R, D] and the bases of all heads."""
        ...


@dataclass(frozen=True)
class Kernels:
    """Where a format's kernels are, and what attention to its tokens has to know.

    Attributes:
        module: name of a `KernelModule`. It needs Triton, so it is imported when it is first needed.
        scales: what has a scale. "groups": keys have one and a minimum for each channel of 32 tokens, values for each 32
            channels of a token. "tokens": both have one a token, and levels that are symmetric about 0. "quarters": values as
            for "tokens", keys one for each quarter of a token's channels, and bits as the spectral format spends them.
        rotates: whether queries are turned, for each run, and the output has to be rotated back.
        packs: the sides that the module packs and unpacks; the other one is packed in plain torch.
    """

    module: str
    scales: Scales
    rotates: bool
    packs: tuple[SideName, ...] = ("keys", "values")

    def load(self) -> KernelModule:
        """The module."""
        return cast(KernelModule, importlib.import_module(self.module))


@dataclass(frozen=True)
class Format:
    """A named pair of quantizers, and their kernels. Without kernels the format runs in plain torch, everywhere.

    Attributes:
        turns_keys: whether keys are stored in the coordinates of their head's basis, where there are bases.
        channels: of which a head_dim must be a multiple.
    """

    name: str
    keys: Quantizer
    values: Quantizer
    kernels: Kernels | None = None
    turns_keys: bool = False
    channels: int = 1


def layout(quantizer: Quantizer, bits: int, head_dim: int) -> dict[str, MetadataRows]:
    """Name and shape of every tensor that holds keys, or values, at this precision; at 16 bits the numbers themselves."""
    if bits == RAW_BITS:
        return {"words": MetadataRows(head_dim)}
    return {"words": MetadataRows(bitpack.words_per_token(head_dim, bits)), **quantizer.metadata(head_dim)}


def row_count(tokens_per_row: int, tokens: Count) -> Count:
    """How many rows of so many tokens a run of `tokens` tokens has."""
    if tokens_per_row == 0:
        return tokens * 0 + 1
    return (tokens + tokens_per_row - 1) // tokens_per_row


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
