"""Tokens of a KV cache in packed storage, to which more can be appended."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from ib_kernels import ragged
from ib_kernels.backends import Backend, Form
from ib_kernels.formats import get_format
from ib_kernels.formats.format import MetadataRows, Quantizer, Side, Sides, layout, row_count
from ib_kernels.packed import Packed, unpack_tokens
from ib_kernels.packing import in_coordinates, quantize_pack
from torch import Tensor


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
        packed = _quantize((format_name, key_bits, value_bits), keys, values, lengths, pairs, raw_dtype=dtype)
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
            **{f"keys.{name}": tensor for name, tensor in self.packed.keys.items()},
            **{f"values.{name}": tensor for name, tensor in self.packed.values.items()},
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
        fitted = _fitted(packed, keys, values, lengths) if begins else _once(packed)
        head, added, group = packed, lengths, _group_tokens(packed)
        if any(n % group for n in held):
            complete = self.lengths - self.lengths % group  # [P]
            head, tail = _split(packed, complete, sum(n - n % group for n in held))
            to = ragged.places(tail.lengths, sum(n % group for n in held), lengths, keys.shape[0])
            keys, values = (ragged.place(old, x, to) for old, x in zip(unpack_tokens(tail, self.backend), (keys, values)))
            added = tail.lengths + lengths
        named = {"fitted": fitted, "raw_dtype": self.dtype, "backend": self.backend, "bases": packed.bases}
        more = _quantize(packed.form, keys, values, added, packed.pairs, **named)
        self.packed = _joined(head, more)

    def select(self, runs: Tensor, pairs: Tensor | None = None) -> PackedTokens:
        """A copy of the runs that the integer vector `runs` names, in its order, repeats allowed, as runs of `pairs` int32.

        By default run p of the copy is that of pair p; tokens in bases, which pairs have, need to be told. Raises ValueError.
        """
        if pairs is None and self.packed.bases is not None:
            raise ValueError("keys are stored in the bases of their pairs: pass the pairs of the runs selected")
        chosen, held = ragged.check_pairs(runs, self.lengths.shape[0]), self.lengths.tolist()
        runs = runs.to(self.lengths.device, torch.int64)
        rows = {}
        for tokens_per_row in _row_totals(self.packed):
            count = row_count(tokens_per_row, self.lengths)
            total = sum(row_count(tokens_per_row, held[run]) for run in chosen)
            rows[tokens_per_row] = ragged.rows_from(ragged.starts(count)[runs], count[runs], total)
        pairs = torch.arange(len(runs), dtype=torch.int32, device=runs.device) if pairs is None else pairs
        return PackedTokens(_taken(self.packed, rows, self.lengths[runs], pairs), self.dtype, self.backend)

    def without_first(self, lengths: Tensor) -> PackedTokens:
        """A copy without the first lengths [P] tokens of each run.

        Raises ValueError for more tokens than a run has, and for formats that store tokens in groups.
        """
        ragged.check_vector(lengths)
        if _group_tokens(self.packed) > 1:
            raise ValueError(f"tokens of the format {self.packed.format!r} are stored in groups, from which none can be taken")
        lengths = lengths.to(self.lengths.device, torch.int32)
        if lengths.shape != self.lengths.shape or bool(((lengths < 0) | (lengths > self.lengths)).any()):
            raise ValueError(f"pass for each of the {self.lengths.shape[0]} runs a number of tokens between 0 and those it has")
        _, rest = _split(self.packed, lengths, int(lengths.sum()))
        return PackedTokens(rest, self.dtype, self.backend)

    def to(self, device: torch.device | str) -> PackedTokens:
        """The same tokens on `device`."""
        keys, values = (
            {name: tensor.to(device) for name, tensor in side.items()} for side in (self.packed.keys, self.packed.values)
        )
        lengths, pairs = self.lengths.to(device), self.packed.pairs.to(device)
        bases = None if self.packed.bases is None else self.packed.bases.to(device)
        packed = dataclasses.replace(self.packed, keys=keys, values=values, lengths=lengths, pairs=pairs, bases=bases)
        return PackedTokens(packed, self.dtype, self.backend)


def _quantize(form: Form, keys: Tensor, values: Tensor, lengths: Tensor, pairs: Tensor, **named: Any) -> Packed:
    """All rows of keys and values [N, D]; `named` as for `quantize_pack`."""
    keys, values = (x.float().contiguous()[None, None] for x in (keys, values))
    rows = torch.arange(keys.shape[2], device=keys.device)
    return quantize_pack(form[0], keys, values, rows, lengths, pairs, form[1], form[2], **named)


def _sides(packed: Packed) -> tuple[tuple[Side, dict[str, MetadataRows]], ...]:
    """The tensors of keys and of values, and their shapes."""
    fmt = get_format(packed.format)
    return (
        (packed.keys, layout(fmt.keys, packed.key_bits, packed.head_dim)),
        (packed.values, layout(fmt.values, packed.value_bits, packed.head_dim)),
    )


def _group_tokens(packed: Packed) -> int:
    """Tokens of a run that are quantized together."""
    return max(1, *(rows.tokens_per_row for _, shapes in _sides(packed) for rows in shapes.values()))


def _row_totals(packed: Packed) -> dict[int, int]:
    """For each number of tokens a row how many such rows there are."""
    return {rows.tokens_per_row: side[name].shape[0] for side, shapes in _sides(packed) for name, rows in shapes.items()}


def _taken(packed: Packed, rows: dict[int, Tensor], lengths: Tensor, pairs: Tensor) -> Packed:
    """Rows rows[tokens_per_row] of every tensor, as runs of lengths [P] and pairs [P]; tensors without such rows stay."""
    keys, values = (
        {name: side[name][rows[row.tokens_per_row]] if row.tokens_per_row in rows else side[name] for name, row in shapes.items()}
        for side, shapes in _sides(packed)
    )
    return dataclasses.replace(packed, keys=keys, values=values, lengths=lengths, pairs=pairs)


def _split(packed: Packed, head_lengths: Tensor, head_tokens: int) -> tuple[Packed, Packed]:
    """The first head_lengths [P] tokens of each run, whole groups, and the rest; what a run has once, both have."""
    heads, tails = {}, {}
    for tokens_per_row, total in _row_totals(packed).items():
        if tokens_per_row > 0:
            count, head_count = (row_count(tokens_per_row, lengths) for lengths in (packed.lengths, head_lengths))
            first, head_total = ragged.starts(count), head_tokens // tokens_per_row
            heads[tokens_per_row] = ragged.rows_from(first, head_count, head_total)
            tails[tokens_per_row] = ragged.rows_from(first + head_count, count - head_count, total - head_total)
    tail_lengths = packed.lengths - head_lengths
    return _taken(packed, heads, head_lengths, packed.pairs), _taken(packed, tails, tail_lengths, packed.pairs)


def _joined(head: Packed, tail: Packed) -> Packed:
    """Every run of `head` followed by that of `tail`; what a run has once is that of `tail`."""
    totals, more_totals = _row_totals(head), _row_totals(tail)
    to = {
        size: ragged.places(row_count(size, head.lengths), total, row_count(size, tail.lengths), more_totals[size])
        for size, total in totals.items()
        if size > 0
    }
    keys, values = (
        {
            name: ragged.place(side[name], more[name], to[rows.tokens_per_row]) if rows.tokens_per_row in to else more[name]
            for name, rows in shapes.items()
        }
        for (side, shapes), (more, _) in zip(_sides(head), _sides(tail))
    )
    return dataclasses.replace(head, keys=keys, values=values, lengths=head.lengths + tail.lengths)


def _once(packed: Packed) -> Sides:
    """What each run keeps from its first tokens."""
    keys, values = (
        {name: side[name] for name, rows in shapes.items() if rows.tokens_per_row == 0} for side, shapes in _sides(packed)
    )
    return Sides(keys, values)


def _fitted(packed: Packed, keys: Tensor, values: Tensor, lengths: Tensor) -> Sides:
    """What each run keeps: as before or, for a run that was empty, what its first tokens, of those given, fit."""
    fmt, begins = get_format(packed.format), (packed.lengths == 0)[:, None]

    def kept(held: Side, quantizer: Quantizer, x: Tensor) -> Side:
        anew = quantizer.fit(x, lengths) if held else {}
        return {name: torch.where(begins, anew[name], tensor) for name, tensor in held.items()}

    once = _once(packed)
    keys = in_coordinates(keys, lengths, packed.pairs, packed.bases)
    return Sides(kept(once.keys, fmt.keys, keys), kept(once.values, fmt.values, values))


def _check(keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    if keys.ndim != 2 or keys.shape != values.shape:
        raise ValueError(
            f"keys {list(keys.shape)} and values {list(values.shape)} must both be [N, D]: "
            "flatten (sequence, head, token) to rows, run after run"
        )
    if not keys.is_floating_point() or not values.is_floating_point():
        raise ValueError(f"keys and values must be floats, got {keys.dtype} and {values.dtype}")
    ragged.check_vector(lengths)
