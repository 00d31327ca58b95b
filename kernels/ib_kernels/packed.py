"""Packed tokens of ragged runs, as the kernels read them, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from ib_kernels import bitpack
from ib_kernels.backends import Backend, Form, backend_of, check_kernel
from ib_kernels.bases import Bases, turn
from ib_kernels.encoding import decode
from ib_kernels.formats import get_format, get_kernels
from ib_kernels.formats.format import RAW_BITS, Kernels, MetadataRows, Side, SideName, layout
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
            rotated "scale" fp16 [N, 1], "centre" fp16 [P, D]. Every format says it in `Quantizer.metadata`.
            spectral "steps" int16 [N, 1], "deviations" fp16 [P, 4], "centre" fp16 [P, D].
        values: "words" as for keys, and for kivi "scale", "minimum" fp16 [N, ceil(D / 32)]; rotated and spectral "scale"
            fp16 [N, 1].
        lengths: int32 [P], tokens of each run, 0 allowed.
        pairs: int32 [P], the (sequence, KV head) pair that each run belongs to.
        bases: of the H KV heads, that of pair p being p modulo H; None where keys are stored as they are. They belong to the
            model, and are no part of what a cache holds.
    """

    format: str
    key_bits: int
    value_bits: int
    head_dim: int
    keys: Side
    values: Side
    lengths: Tensor
    pairs: Tensor
    bases: Bases | None = None

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
    def form(self) -> Form:
        """Format, key bits and value bits."""
        return self.format, self.key_bits, self.value_bits

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*self.keys.values(), *self.values.values(), self.lengths, self.pairs]


@torch.no_grad()
def unpack_tokens(packed: Packed, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values fp32 [N, D] that `packed` stands for; `backend` is by default that of the device.

    Raises ValueError if the kernels run and do not take such tokens.
    """
    kernels = None
    raw = RAW_BITS in (packed.key_bits, packed.value_bits)
    if not raw and backend_of(packed.lengths.device, [packed.form], backend) == "triton":
        check_kernel(packed.head_dim, *packed.form)
        if not all(tensor.is_contiguous() for tensor in packed.tensors):
            raise ValueError("the GPU kernels need contiguous tensors: call .contiguous() on the tensors of a packed part")
        kernels = get_kernels(packed.format)
    keys, values = (_unpack(packed, name, kernels) for name in get_args(SideName))
    bases = bases_of_runs(packed)
    return keys if bases is None else turn(keys, packed.lengths, bases.back), values


def unpack_stored(packed: Packed) -> tuple[Tensor, Tensor]:
    """The same in plain torch, with keys in the coordinates that they are stored in (see `bases_of_runs`)."""
    return _unpack(packed, "keys"), _unpack(packed, "values")


def bases_of_runs(packed: Packed) -> Bases | None:
    """The bases that the keys of each run are stored in, [P, D, D]; None if they are stored as they are."""
    if packed.bases is None:
        return None
    return packed.bases.of(packed.pairs % len(packed.bases.back))


def _unpack(packed: Packed, name: SideName, kernels: Kernels | None = None) -> Tensor:
    """Rows fp32 [N, D] of one side, by the kernels if they unpack it."""
    side: Side = getattr(packed, name)
    bits = packed.key_bits if name == "keys" else packed.value_bits
    if kernels is not None and name in kernels.packs:
        with torch.cuda.device_of(packed.lengths):  # Triton launches on the current GPU
            return kernels.load().unpack(name, side, packed.lengths, packed.head_dim, bits)
    codes = side["words"] if bits == RAW_BITS else bitpack.unpack(side["words"], bits, packed.head_dim)
    return decode(getattr(get_format(packed.format), name), codes, side, packed.lengths, bits)


def _check_side(side_name: SideName, side: Side, shapes: dict[str, MetadataRows], bits: int, runs: int) -> None:
    """Shapes and dtypes: the kernels compute addresses from them."""
    groups = [side[name].shape[0] for name, rows in shapes.items() if rows.tokens_per_row > 1]
    for name, rows in shapes.items():
        count = {0: runs, 1: side["words"].shape[0]}.get(rows.tokens_per_row, max(groups, default=0))
        dtypes = (rows.dtype,) if name != "words" else (torch.int16,) if bits != RAW_BITS else WORD_DTYPES
        if side[name].shape != (count, rows.width) or side[name].dtype not in dtypes:
            raise ValueError(
                f"the {side_name} {name} of {bits} bits must be {list(dtypes)} [{count}, {rows.width}], "
                f"got {side[name].dtype} {list(side[name].shape)}"
            )
