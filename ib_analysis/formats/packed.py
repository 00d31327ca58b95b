"""Tokens of a KV cache in packed storage, and the exact bytes that they take."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import torch
from ib_kernels import ragged
from numpy.typing import NDArray
from torch import Tensor

from ib_analysis.formats.codec import Codec, codecs, get_format

LENGTH_BYTES = 4  # the number of tokens of a run is stored as int32


class PackedTokens:
    """Tokens of P runs, a run being one (sequence, KV head) pair, at one format, key precision and value precision.

    Build it with `PackedTokens.pack`. Tokens lie run after run, so a run may have any number of them, 0 included.
    """

    def __init__(
        self,
        format_name: str,
        key_codec: Codec,
        value_codec: Codec,
        keys: dict[str, Tensor],
        values: dict[str, Tensor],
        lengths: Tensor,
    ) -> None:
        self.format_name = format_name
        self.lengths = lengths  # int32 [P]
        self._key_codec, self._value_codec = key_codec, value_codec
        self._keys, self._values = keys, values

    @classmethod
    @torch.no_grad()
    def pack(
        cls,
        format_name: str,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        key_bits: int,
        value_bits: int,
        dtype: torch.dtype = torch.float16,
    ) -> PackedTokens:
        """Quantize and pack keys and values [N, D] of P consecutive runs of lengths [P].

        Args:
            format_name: a name in FORMATS.
            keys, values: any float dtype; computed in float32.
            key_bits, value_bits: 2, 3, 4, 8, or 16 for raw storage.
            dtype: torch.float16 or torch.bfloat16, what 16 bits means. Larger values saturate.

        Raises ValueError for an unknown format, precision or dtype, or if shapes and lengths do not fit.
        """
        _check(keys, values, lengths)
        key_codec, value_codec = codecs(format_name, keys.shape[1], key_bits, value_bits, dtype)
        lengths = lengths.to(keys.device, torch.int32, copy=True)
        return cls(
            format_name,
            key_codec,
            value_codec,
            key_codec.encode(keys.float(), lengths),
            value_codec.encode(values.float(), lengths),
            lengths,
        )

    @property
    def key_bits(self) -> int:
        return self._key_codec.bits

    @property
    def value_bits(self) -> int:
        return self._value_codec.bits

    @property
    def head_dim(self) -> int:
        return self._key_codec.head_dim

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, lengths included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held: "lengths", "keys.words", "keys.scale", ..., "values.words", ..."""
        return {
            "lengths": self.lengths,
            **{f"keys.{name}": part for name, part in self._keys.items()},
            **{f"values.{name}": part for name, part in self._values.items()},
        }

    @torch.no_grad()
    def unpack(self) -> tuple[Tensor, Tensor]:
        """Dequantized keys and values, fp32 [N, D] each."""
        return self._key_codec.decode(self._keys, self.lengths), self._value_codec.decode(self._values, self.lengths)

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        """Add tokens [N_new, D], lengths [P] of them (0 allowed), to the end of each run, in place.

        The bytes held depend only on how many tokens each run has, not on how they arrived: an incomplete last group is
        quantized again together with the new tokens. Raises ValueError if shapes and lengths do not fit.
        """
        _check(keys, values, lengths)
        if keys.shape[1] != self.head_dim or lengths.shape != self.lengths.shape:
            raise ValueError(
                f"got {lengths.shape[0]} runs of head_dim {keys.shape[1]}: pass one length, 0 allowed, for each of the "
                f"{self.lengths.shape[0]} runs of head_dim {self.head_dim}"
            )
        lengths = lengths.to(self.lengths)
        self._keys = self._key_codec.append(self._keys, self.lengths, keys.float(), lengths)
        self._values = self._value_codec.append(self._values, self.lengths, values.float(), lengths)
        self.lengths = self.lengths + lengths

    @torch.no_grad()
    def select(self, pairs: Tensor) -> PackedTokens:
        """A copy of the runs that the integer vector `pairs` names, in its order; repeats allowed."""
        ragged.check_pairs(pairs, self.lengths.shape[0])
        pairs = pairs.to(self.lengths.device, torch.int64)
        return self._with(
            self._key_codec.select(self._keys, self.lengths, pairs),
            self._value_codec.select(self._values, self.lengths, pairs),
            self.lengths[pairs],
        )

    def to(self, device: torch.device | str) -> PackedTokens:
        """The same tokens on `device`."""
        return self._with(
            {name: part.to(device) for name, part in self._keys.items()},
            {name: part.to(device) for name, part in self._values.items()},
            self.lengths.to(device),
        )

    def _with(self, keys: dict[str, Tensor], values: dict[str, Tensor], lengths: Tensor) -> PackedTokens:
        return PackedTokens(self.format_name, self._key_codec, self._value_codec, keys, values, lengths)


@overload
def tokens_nbytes(format_name: str, tokens: int, head_dim: int, key_bits: int, value_bits: int) -> int: ...
@overload
def tokens_nbytes(
    format_name: str, tokens: NDArray[np.integer[Any]], head_dim: int, key_bits: int, value_bits: int
) -> NDArray[np.int64]: ...
def tokens_nbytes(
    format_name: str, tokens: int | NDArray[np.integer[Any]], head_dim: int, key_bits: int, value_bits: int
) -> int | NDArray[np.int64]:
    """Exact bytes of one run of `tokens` tokens in `PackedTokens`, its 4-byte length included.

    `tokens` may be an integer array, for the bytes of one run of each count.
    Raises ValueError for an unknown format or precision, or for counts that are negative or no integers.
    """
    counts = np.asarray(tokens)
    if not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise ValueError("tokens must be counts: pass integers of at least 0")
    key_codec, value_codec = codecs(format_name, head_dim, key_bits, value_bits, torch.float16)
    counts = counts.astype(np.int64)
    nbytes = key_codec.nbytes(counts) + value_codec.nbytes(counts) + LENGTH_BYTES
    return nbytes if isinstance(tokens, np.ndarray) else int(nbytes)


@torch.no_grad()
def roundtrip_keys(format_name: str, x: Tensor, lengths: Tensor, bits: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Quantize and dequantize keys x [N, D], runs of lengths [P] one after the other: fp32 [N, D].

    Bit for bit what `PackedTokens.unpack` gives for the same runs; `bits` = 16 rounds to `dtype`.
    Raises ValueError for an unknown format, precision or dtype.
    """
    return _roundtrip(Codec(get_format(format_name).keys, bits, x.shape[-1], dtype), x, lengths)


@torch.no_grad()
def roundtrip_values(format_name: str, x: Tensor, lengths: Tensor, bits: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """As `roundtrip_keys`, for values x [N, D]."""
    return _roundtrip(Codec(get_format(format_name).values, bits, x.shape[-1], dtype), x, lengths)


def _roundtrip(codec: Codec, x: Tensor, lengths: Tensor) -> Tensor:
    if not x.is_floating_point() or x.ndim != 2:
        raise ValueError(f"expected floats [N, D], got {x.dtype} {list(x.shape)}")
    ragged.check(x, lengths)
    return codec.roundtrip(x.float(), lengths)


def _check(keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    if keys.ndim != 2 or keys.shape != values.shape:
        raise ValueError(
            f"keys {list(keys.shape)} and values {list(values.shape)} must both be [N, D]: "
            "flatten (sequence, head, token) to rows, run after run"
        )
    if not keys.is_floating_point() or not values.is_floating_point():
        raise ValueError(f"keys and values must be floats, got {keys.dtype} and {values.dtype}")
    ragged.check(keys, lengths)
