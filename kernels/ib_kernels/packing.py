"""Gather the tokens that are kept, quantize them and pack their codes."""

from __future__ import annotations

import torch
from ib_kernels import bitpack, ragged
from ib_kernels.backends import Backend, backend_of, check_kernel
from ib_kernels.bases import Bases, turn
from ib_kernels.encoding import encode, in_bases
from ib_kernels.formats import get_format, get_kernels
from ib_kernels.formats.format import RAW_BITS, Quantizer, Side, SideName, Sides, check_precision, layout
from ib_kernels.packed import Packed
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@torch.no_grad()
def quantize_pack(
    fmt: str,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    key_bits: int,
    value_bits: int,
    fitted: Sides | None = None,
    raw_dtype: torch.dtype = torch.float16,
    backend: Backend | None = None,
    bases: Bases | None = None,
) -> Packed:
    """Packed tokens of P runs. On a GPU one pass reads the kept tokens.

    Args:
        fmt: a name in FORMATS.
        keys, values: [B, H_kv, T, D], fp16, bf16 or fp32, channels contiguous, other strides free.
        rows: int64 [N], what to keep, run after run: (b * H_kv + h) * T + t for token t of head h in sequence b. All rows of
            a run belong to one head.
        lengths: int32 [P], kept tokens of each run, 0 allowed.
        pairs: int32 [P], the (sequence, KV head) pair of each run.
        key_bits, value_bits: 2, 3, 4, 8, or 16 for raw storage.
        fitted: what the runs keep from the first tokens they had, fp16 [P, width] for each tensor of one row a run, as a
            rotated run keeps its "centre"; by default these are the first.
        raw_dtype: torch.float16 or torch.bfloat16, what 16 bits means. Larger values saturate.
        backend: by default that of the device (see `backends`). Both give the same bits.
        bases: of the H KV heads, that of pair p being p modulo H, for formats that store keys in them; None for as they are.

    Raises ValueError for an unknown format or precision, for shapes, dtypes or devices that do not fit and, if the kernels
    run, for a head_dim that is no multiple of 16 up to 256 and for 16 bits on one side only.
    """
    check_precision(key_bits, raw_dtype)
    check_precision(value_bits)
    _check(fmt, keys, values, rows, lengths, pairs)
    if fitted is not None:
        _check_fitted("keys", get_format(fmt).keys, fitted.keys, key_bits, keys, lengths)
        _check_fitted("values", get_format(fmt).values, fitted.values, value_bits, values, lengths)
    counts = _read(keys, rows, lengths)
    bases = bases if in_bases(fmt, "keys", key_bits) else None
    form = fmt, key_bits, value_bits
    kernels = None
    if backend_of(keys.device, [form], backend) == "triton" and not key_bits == value_bits == RAW_BITS:
        check_kernel(keys.shape[3], *form)
        kernels = get_kernels(fmt)
    sides: dict[SideName, Side] = {}
    both: list[tuple[SideName, Tensor, int]] = [("values", values, value_bits), ("keys", keys, key_bits)]
    for name, x, bits in both:
        kept = None if fitted is None else getattr(fitted, name)
        if kernels is not None and name in kernels.packs:
            with torch.cuda.device_of(keys):  # Triton launches on the current GPU
                sides[name] = kernels.load().pack(name, x, rows, lengths, counts, bits, kept)
        else:
            gathered = _gather(x, rows)
            turned = in_coordinates(gathered, lengths, pairs, bases) if name == "keys" else gathered
            sides[name] = _packed_side(getattr(get_format(fmt), name), turned, lengths, bits, raw_dtype, kept)
    return Packed(*form, keys.shape[3], sides["keys"], sides["values"], lengths, pairs, bases)


def in_coordinates(keys: Tensor, lengths: Tensor, pairs: Tensor, bases: Bases | None) -> Tensor:
    """Keys [N, D] of runs of lengths [P] as they are quantized: in the bases of their pairs [P], if there are any."""
    if bases is None:
        return keys
    return turn(keys, lengths, bases.of(pairs % len(bases.into)).into)


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [N, D] of x [B, H_kv, T, D], whatever its strides, without a copy of the rest."""
    heads, tokens = x.shape[1:3]
    if x.is_contiguous():
        return x.view(-1, x.shape[3])[rows]
    pair = rows // max(1, tokens)
    return x[pair // heads, pair % heads, rows - pair * tokens]


def _packed_side(
    quantizer: Quantizer, x: Tensor, lengths: Tensor, bits: int, raw_dtype: torch.dtype, fitted: Side | None
) -> Side:
    """Words and metadata of rows x [N, D], runs of lengths [P]."""
    codes, metadata = encode(quantizer, x, lengths, bits, raw_dtype, fitted)
    return {"words": codes if bits == RAW_BITS else bitpack.pack(codes, bits), **metadata}


def _check(fmt: str, keys: Tensor, values: Tensor, rows: Tensor, lengths: Tensor, pairs: Tensor) -> None:
    get_format(fmt)
    if keys.ndim != 4 or keys.shape != values.shape:
        raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} must both be [B, H_kv, T, D]")
    if keys.dtype not in DTYPES or values.dtype not in DTYPES:
        raise ValueError(f"keys and values must be of {list(DTYPES)}, got {keys.dtype} and {values.dtype}")
    if keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError("the channels of a token must be contiguous: call .contiguous() on keys and values")
    if rows.dtype != torch.int64 or rows.ndim != 1 or not rows.is_contiguous():
        raise ValueError(f"rows must be a contiguous int64 vector, got {rows.dtype} {list(rows.shape)}")
    if lengths.dtype != torch.int32 or pairs.dtype != torch.int32 or lengths.ndim != 1 or lengths.shape != pairs.shape:
        raise ValueError(f"lengths and pairs must be int32 [P], got {lengths.dtype} {list(lengths.shape)}, {pairs.dtype}")
    if any(tensor.device != keys.device for tensor in (values, rows, lengths, pairs)):
        raise ValueError("keys, values, rows, lengths and pairs must be on one device")


def _check_fitted(name: SideName, quantizer: Quantizer, fitted: Side, bits: int, x: Tensor, lengths: Tensor) -> None:
    once = {k: rows.width for k, rows in layout(quantizer, bits, x.shape[3]).items() if rows.tokens_per_row == 0}
    if fitted.keys() != once.keys():
        raise ValueError(f"the {name} of {bits} bits keep {list(once)} of what was fitted, got {list(fitted)}")
    for k, tensor in fitted.items():
        if tensor.dtype != torch.float16 or tensor.shape != (lengths.shape[0], once[k]) or tensor.device != x.device:
            raise ValueError(
                f"the {name} {k} must be fp16 [{lengths.shape[0]}, {once[k]}] on {x.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )


def _read(keys: Tensor, rows: Tensor, lengths: Tensor) -> list[int]:
    """The lengths. All that is asked of the numbers on the device is read at once: reading waits for the GPU.

    Raises ValueError if the lengths do not fit the rows, or the rows do not fit the keys.
    """
    lowest_and_highest = torch.stack(rows.aminmax()) if rows.numel() else rows
    numbers: list[int] = torch.cat([lowest_and_highest, lengths]).tolist()
    counts = numbers[lowest_and_highest.shape[0] :]
    ragged.check_counts(rows, counts)
    tokens = keys.shape[:3].numel()
    if rows.numel() and not 0 <= numbers[0] <= numbers[1] < tokens:
        raise ValueError(f"rows must lie in [0, {tokens}), the tokens of keys, got {numbers[0]} to {numbers[1]}")
    return counts
