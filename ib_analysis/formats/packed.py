"""Tokens of a KV cache in packed storage, and the exact bytes that they take."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, overload

import numpy as np
import torch
from ib_kernels import Packed, quantize_pack, ragged, unpack_tokens
from ib_kernels.backends import Backend
from ib_kernels.formats import get_format
from ib_kernels.quantizer import ITEM_BYTES, RAW_BITS, MetadataRows, Quantizer, check_precision, layout, saturating
from numpy.typing import NDArray
from torch import Tensor

RUN_BYTES = 8  # of a run: its number of tokens and its pair, int32 each

Count = TypeVar("Count", int, NDArray[np.int64], Tensor)


class PackedTokens:
    """`Packed` tokens to which more can be appended. A run is the tokens of one (sequence, KV head) pair, 0 or more.

    `dtype`, torch.float16 or torch.bfloat16, is what 16 bits means. `backend` is by default that of the device (see
    `ib_kernels.backends`).
    """

    def __init__(self, packed: Packed, dtype: torch.dtype = torch.float16, backend: Backend | None = None) -> None:
        self.packed, self.dtype, self.backend = packed, dtype, backend

    @classmethod
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
        """Quantize and pack keys and values [N, D] of P consecutive runs of lengths [P]; run p is that of pair p.

        Args:
            format_name: a name in FORMATS.
            keys, values: any float dtype; computed in float32.
            key_bits, value_bits: 2, 3, 4, 8, or 16 for raw storage.
            dtype: torch.float16 or torch.bfloat16, what 16 bits means. Larger values saturate.

        Raises ValueError for an unknown format, precision or dtype, or if shapes and lengths do not fit.
        """
        _check(keys, values, lengths)
        lengths = lengths.to(keys.device, torch.int32, copy=True)
        pairs = torch.arange(len(lengths), dtype=torch.int32, device=keys.device)
        packed = _quantize(format_name, keys, values, lengths, pairs, key_bits, value_bits, None, dtype, None)
        return cls(packed, dtype)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each run: int32 [P]."""
        return self.packed.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held: "lengths", "pairs", "keys.words", "keys.scale", ..., "values.words", ..."""
        return {
            "lengths": self.lengths,
            "pairs": self.packed.pairs,
            **{f"keys.{name}": part for name, part in self.packed.keys.items()},
            **{f"values.{name}": part for name, part in self.packed.values.items()},
        }

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Dequantized keys and values, fp32 [N, D] each."""
        return unpack_tokens(self.packed, self.backend)

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        """Add tokens [N_new, D], lengths [P] of them (0 allowed), to the end of each run, in place.

        The bytes held depend only on how many tokens each run has, not on how they arrived: an incomplete last group is
        quantized again together with the new tokens. Raises ValueError if shapes and lengths do not fit.
        """
        _check(keys, values, lengths)
        packed = self.packed
        if keys.shape[1] != packed.head_dim or lengths.shape != self.lengths.shape:
            raise ValueError(
                f"got {lengths.shape[0]} runs of head_dim {keys.shape[1]}: pass one length, 0 allowed, for each of the "
                f"{self.lengths.shape[0]} runs of head_dim {packed.head_dim}"
            )
        lengths = lengths.to(self.lengths.device)
        held, new = torch.stack([self.lengths, lengths]).tolist()  # at once, because reading waits for the GPU
        ragged.check_counts(keys, new)
        lengths, keys, values = lengths.to(torch.int32), keys.float(), values.float()
        begins = any(before == 0 < n for before, n in zip(held, new))
        centre = _centre(packed, keys, lengths) if begins else packed.keys.get("centre")
        head, added, group = packed, lengths, _group_tokens(packed)
        if any(n % group for n in held):
            complete = self.lengths - self.lengths % group  # [P]
            head, tail = _split(packed, complete, sum(n - n % group for n in held))
            to = ragged.places(tail.lengths, sum(n % group for n in held), lengths, keys.shape[0])
            keys, values = (ragged.place(old, x, to) for old, x in zip(unpack_tokens(tail, self.backend), (keys, values)))
            added = tail.lengths + lengths
        precisions = packed.key_bits, packed.value_bits
        more = _quantize(packed.format, keys, values, added, packed.pairs, *precisions, centre, self.dtype, self.backend)
        self.packed = _joined(head, more)

    def select(self, runs: Tensor, pairs: Tensor | None = None) -> PackedTokens:
        """A copy of the runs that the integer vector `runs` names, in its order, repeats allowed, as runs of `pairs` int32.

        By default run p of the copy is that of pair p.
        """
        chosen, held = ragged.check_pairs(runs, self.lengths.shape[0]), self.lengths.tolist()
        runs = runs.to(self.lengths.device, torch.int64)
        rows = {}
        for tokens_per_row in _row_totals(self.packed):
            count = _row_count(tokens_per_row, self.lengths)
            total = sum(_row_count(tokens_per_row, held[run]) for run in chosen)
            rows[tokens_per_row] = ragged.rows_from(ragged.starts(count)[runs], count[runs], total)
        pairs = torch.arange(len(runs), dtype=torch.int32, device=runs.device) if pairs is None else pairs
        return PackedTokens(_taken(self.packed, rows, self.lengths[runs], pairs), self.dtype, self.backend)

    def to(self, device: torch.device | str) -> PackedTokens:
        """The same tokens on `device`."""
        keys, values = (
            {name: tensor.to(device) for name, tensor in part.items()} for part in (self.packed.keys, self.packed.values)
        )
        lengths, pairs = self.lengths.to(device), self.packed.pairs.to(device)
        packed = dataclasses.replace(self.packed, keys=keys, values=values, lengths=lengths, pairs=pairs)
        return PackedTokens(packed, self.dtype, self.backend)


@overload
def tokens_nbytes(format_name: str, tokens: int, head_dim: int, key_bits: int, value_bits: int) -> int: ...
@overload
def tokens_nbytes(
    format_name: str, tokens: NDArray[np.integer[Any]], head_dim: int, key_bits: int, value_bits: int
) -> NDArray[np.int64]: ...
def tokens_nbytes(
    format_name: str, tokens: int | NDArray[np.integer[Any]], head_dim: int, key_bits: int, value_bits: int
) -> int | NDArray[np.int64]:
    """Exact bytes of one run of `tokens` tokens in `PackedTokens`, its length and pair included.

    `tokens` may be an integer array, for the bytes of one run of each count.
    Raises ValueError for an unknown format or precision, or for counts that are negative or no integers.
    """
    counts = np.asarray(tokens)
    if not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise ValueError("tokens must be counts: pass integers of at least 0")
    fmt = get_format(format_name)
    counts = counts.astype(np.int64)
    nbytes = side_nbytes(fmt.keys, counts, head_dim, key_bits) + side_nbytes(fmt.values, counts, head_dim, value_bits)
    return nbytes + RUN_BYTES if isinstance(tokens, np.ndarray) else int(nbytes) + RUN_BYTES


def side_nbytes(quantizer: Quantizer, tokens: NDArray[np.int64], head_dim: int, bits: int) -> NDArray[np.int64]:
    """Exact bytes of the keys, or of the values, of one run of each number of tokens, its length and pair left out."""
    check_precision(bits)
    total = np.zeros_like(tokens)
    for rows in layout(quantizer, bits, head_dim).values():
        total = total + _row_count(rows.tokens_per_row, tokens) * (rows.width * ITEM_BYTES)
    return total


@torch.no_grad()
def roundtrip_keys(format_name: str, x: Tensor, lengths: Tensor, bits: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Quantize and dequantize keys x [N, D], runs of lengths [P] one after the other: fp32 [N, D].

    Bit for bit what `PackedTokens.unpack` gives for the same runs; `bits` = 16 rounds to `dtype`.
    Raises ValueError for an unknown format, precision or dtype.
    """
    return _roundtrip(get_format(format_name).keys, x, lengths, bits, dtype)


@torch.no_grad()
def roundtrip_values(format_name: str, x: Tensor, lengths: Tensor, bits: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """As `roundtrip_keys`, for values x [N, D]."""
    return _roundtrip(get_format(format_name).values, x, lengths, bits, dtype)


def _roundtrip(quantizer: Quantizer, x: Tensor, lengths: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    check_precision(bits, dtype)
    if not x.is_floating_point() or x.ndim != 2:
        raise ValueError(f"expected floats [N, D], got {x.dtype} {list(x.shape)}")
    ragged.check(x, lengths)
    x = x.float()
    if bits == RAW_BITS:
        return saturating(x, dtype).float()
    codes, metadata = quantizer.quantize(x, lengths, bits, quantizer.fit(x, lengths))
    return quantizer.dequantize(codes, metadata, lengths, bits)


def _quantize(
    format_name: str,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    key_bits: int,
    value_bits: int,
    centre: Tensor | None,
    dtype: torch.dtype,
    backend: Backend | None,
) -> Packed:
    """All rows of keys and values [N, D]."""
    keys, values = (x.float().contiguous()[None, None] for x in (keys, values))
    rows = torch.arange(keys.shape[2], device=keys.device)
    return quantize_pack(format_name, keys, values, rows, lengths, pairs, key_bits, value_bits, centre, dtype, backend)


def _sides(packed: Packed) -> tuple[tuple[dict[str, Tensor], dict[str, MetadataRows]], ...]:
    """The tensors of keys and of values, and their shapes."""
    fmt = get_format(packed.format)
    return (
        (packed.keys, layout(fmt.keys, packed.key_bits, packed.head_dim)),
        (packed.values, layout(fmt.values, packed.value_bits, packed.head_dim)),
    )


def _group_tokens(packed: Packed) -> int:
    """Tokens of a run that are quantized together."""
    return max(1, *(rows.tokens_per_row for _, shapes in _sides(packed) for rows in shapes.values()))


def _row_count(tokens_per_row: int, tokens: Count) -> Count:
    """How many such rows a run of `tokens` tokens has."""
    if tokens_per_row == 0:
        return tokens * 0 + 1
    return (tokens + tokens_per_row - 1) // tokens_per_row


def _row_totals(packed: Packed) -> dict[int, int]:
    """For each number of tokens a row how many such rows there are."""
    return {rows.tokens_per_row: part[name].shape[0] for part, shapes in _sides(packed) for name, rows in shapes.items()}


def _taken(packed: Packed, rows: dict[int, Tensor], lengths: Tensor, pairs: Tensor) -> Packed:
    """Rows rows[tokens_per_row] of every tensor, as runs of lengths [P] and pairs [P]; tensors without such rows stay."""
    keys, values = (
        {name: part[name][rows[row.tokens_per_row]] if row.tokens_per_row in rows else part[name] for name, row in shapes.items()}
        for part, shapes in _sides(packed)
    )
    return dataclasses.replace(packed, keys=keys, values=values, lengths=lengths, pairs=pairs)


def _split(packed: Packed, head_lengths: Tensor, head_tokens: int) -> tuple[Packed, Packed]:
    """The first head_lengths [P] tokens of each run, whole groups, and the rest; what a run has once, both have."""
    heads, tails = {}, {}
    for tokens_per_row, total in _row_totals(packed).items():
        if tokens_per_row > 0:
            count, head_count = (_row_count(tokens_per_row, lengths) for lengths in (packed.lengths, head_lengths))
            first, head_total = ragged.starts(count), head_tokens // tokens_per_row
            heads[tokens_per_row] = ragged.rows_from(first, head_count, head_total)
            tails[tokens_per_row] = ragged.rows_from(first + head_count, count - head_count, total - head_total)
    tail_lengths = packed.lengths - head_lengths
    return _taken(packed, heads, head_lengths, packed.pairs), _taken(packed, tails, tail_lengths, packed.pairs)


def _joined(head: Packed, tail: Packed) -> Packed:
    """Every run of `head` followed by that of `tail`; what a run has once is that of `tail`."""
    totals, more_totals = _row_totals(head), _row_totals(tail)
    to = {
        size: ragged.places(_row_count(size, head.lengths), total, _row_count(size, tail.lengths), more_totals[size])
        for size, total in totals.items()
        if size > 0
    }
    keys, values = (
        {
            name: ragged.place(part[name], more[name], to[rows.tokens_per_row]) if rows.tokens_per_row in to else more[name]
            for name, rows in shapes.items()
        }
        for (part, shapes), (more, _) in zip(_sides(head), _sides(tail))
    )
    return dataclasses.replace(head, keys=keys, values=values, lengths=head.lengths + tail.lengths)


def _centre(packed: Packed, new_keys: Tensor, new_lengths: Tensor) -> Tensor | None:
    """What the keys of each run are centred on, fp16 [P, D]: as before, or for a run that was empty its first tokens' mean."""
    if "centre" not in packed.keys:
        return None
    fitted = get_format(packed.format).keys.fit(new_keys, new_lengths)["centre"]
    return torch.where((packed.lengths == 0)[:, None], fitted, packed.keys["centre"])


def _check(keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    if keys.ndim != 2 or keys.shape != values.shape:
        raise ValueError(
            f"keys {list(keys.shape)} and values {list(values.shape)} must both be [N, D]: "
            "flatten (sequence, head, token) to rows, run after run"
        )
    if not keys.is_floating_point() or not values.is_floating_point():
        raise ValueError(f"keys and values must be floats, got {keys.dtype} and {values.dtype}")
    ragged.check_vector(lengths)
