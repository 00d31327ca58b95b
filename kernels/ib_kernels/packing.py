"""Gather the tokens that are kept, quantize them and pack their codes."""

from __future__ import annotations

import torch
from ib_kernels import bitpack, ragged
from ib_kernels.backends import Backend, check_kernel, default_backend
from ib_kernels.formats import get_format
from ib_kernels.packed import Packed
from ib_kernels.quantizer import RAW_BITS, Quantizer, check_precision, saturating
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Parts = dict[str, Tensor]


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
    centre: Tensor | None = None,
    raw_dtype: torch.dtype = torch.float16,
    backend: Backend | None = None,
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
        centre: fp16 [P, D], subtracted from rotated keys; by default the mean of a sample of each run.
        raw_dtype: torch.float16 or torch.bfloat16, what 16 bits means. Larger values saturate.
        backend: by default that of the device (see `backends`). Both give the same bits.

    Raises ValueError for an unknown format or precision, for shapes, dtypes or devices that do not fit and, if the kernels
    run, for a head_dim that is no multiple of 16 up to 256 and for 16 bits on one side only.
    """
    check_precision(key_bits, raw_dtype)
    check_precision(value_bits)
    _check(fmt, keys, values, rows, lengths, pairs, centre)
    counts = _read(keys, rows, lengths)
    backend = default_backend(keys.device) if backend is None else backend
    if backend == "reference" or key_bits == value_bits == RAW_BITS:
        parts = quantize_pack_reference(fmt, keys, values, rows, lengths, key_bits, value_bits, centre, raw_dtype)
    else:
        parts = quantize_pack_triton(fmt, keys, values, rows, lengths, key_bits, value_bits, centre, counts)
    return Packed(fmt, key_bits, value_bits, keys.shape[3], *parts, lengths, pairs)


def quantize_pack_reference(
    fmt: str,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    lengths: Tensor,
    key_bits: int,
    value_bits: int,
    centre: Tensor | None,
    raw_dtype: torch.dtype = torch.float16,
) -> tuple[Parts, Parts]:
    """The parts of keys and of values (see `Packed`), in plain torch."""
    fitted = None if centre is None else {"centre": centre}
    sides = get_format(fmt)
    return (
        _encode(sides.keys, _gather(keys, rows), lengths, key_bits, fitted, raw_dtype),
        _encode(sides.values, _gather(values, rows), lengths, value_bits, None, raw_dtype),
    )


def quantize_pack_triton(
    fmt: str,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    lengths: Tensor,
    key_bits: int,
    value_bits: int,
    centre: Tensor | None,
    counts: list[int] | None = None,
) -> tuple[Parts, Parts]:
    """`quantize_pack_reference` by the kernels, for 2, 3, 4 or 8 bits; `counts` are the lengths, if they are known here."""
    from ib_kernels import kivi_triton, rotated_triton
    from ib_kernels.quantize_triton import piece_count, pieces

    check_kernel(keys.shape[3], fmt, key_bits, value_bits)
    known: list[int] = lengths.tolist() if counts is None else counts
    with torch.cuda.device_of(keys):  # Triton launches on the current GPU
        size = kivi_triton.GROUP_TOKENS if fmt == "kivi" else rotated_triton.TOKENS
        tokens = pieces(lengths, size, piece_count(known, size))
        if fmt == "kivi":
            return kivi_triton.pack_keys(keys, rows, tokens, key_bits), kivi_triton.pack_values(values, rows, tokens, value_bits)
        value_parts = rotated_triton.pack(values, rows, tokens, value_bits, None)  # first: then the GPU is not idle
        if centre is None:
            longest = max([1, *known])
            runs = pieces(lengths, longest, piece_count(known, longest))
            centre = rotated_triton.centre(keys, rows, runs, lengths.shape[0])
        return rotated_triton.pack(keys, rows, tokens, key_bits, centre), value_parts


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [N, D] of x [B, H_kv, T, D], whatever its strides, without a copy of the rest."""
    heads, tokens = x.shape[1:3]
    if x.is_contiguous():
        return x.view(-1, x.shape[3])[rows]
    pair = rows // max(1, tokens)
    return x[pair // heads, pair % heads, rows - pair * tokens]


def _encode(quantizer: Quantizer, x: Tensor, lengths: Tensor, bits: int, fitted: Parts | None, raw_dtype: torch.dtype) -> Parts:
    """Parts of rows x [N, D], runs of lengths [P]."""
    if bits == RAW_BITS:
        return {"words": saturating(x.float(), raw_dtype)}
    x = x.float()
    codes, metadata = quantizer.quantize(x, lengths, bits, quantizer.fit(x, lengths) if fitted is None else fitted)
    return {"words": bitpack.pack(codes, bits), **metadata}


def _check(fmt: str, keys: Tensor, values: Tensor, rows: Tensor, lengths: Tensor, pairs: Tensor, centre: Tensor | None) -> None:
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
    if centre is not None and (centre.dtype != torch.float16 or centre.shape != (lengths.shape[0], keys.shape[3])):
        raise ValueError(f"centre must be fp16 [P, D], got {centre.dtype} {list(centre.shape)}")
    tensors = [values, rows, lengths, pairs] + ([] if centre is None else [centre])
    if any(tensor.device != keys.device for tensor in tensors):
        raise ValueError("keys, values, rows, lengths, pairs and centre must be on one device")


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
