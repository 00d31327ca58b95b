"""Gather the tokens that are kept, quantize them and pack their codes."""

from __future__ import annotations

import torch
from ib_kernels import bitpack, kivi, ragged, rotated
from ib_kernels.packed import FORMATS, Packed
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_CHANNELS = 256


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
) -> Packed:
    """Packed tokens of P runs. On a GPU one pass reads the kept tokens (two read the keys of a rotated format).

    Args:
        fmt: "kivi" or "rotated".
        keys, values: [B, H_kv, T, D], fp16, bf16 or fp32, channels contiguous, other strides free.
        rows: int64 [N], what to keep, run after run: (b * H_kv + h) * T + t for token t of head h in sequence b. All rows of
            a run belong to one head.
        lengths: int32 [P], kept tokens of each run, 0 allowed.
        pairs: int32 [P], the (sequence, KV head) pair of each run.
        key_bits, value_bits: 2, 3, 4 or 8.
        centre: fp16 [P, D], subtracted from rotated keys; by default the mean of each run.

    Returns the same bits as the formats of a compressed cache do in plain torch on a CPU.

    Raises ValueError for an unknown format or precision, for shapes, dtypes or devices that do not fit and, on a GPU, for a
    head_dim that is no multiple of 16 up to 256.
    """
    _check(fmt, keys, values, rows, lengths, pairs, key_bits, value_bits, centre)
    make = quantize_pack_triton if keys.is_cuda else quantize_pack_reference
    key_parts, value_parts = make(fmt, keys, values, rows, lengths, key_bits, value_bits, centre)
    return Packed(fmt, key_bits, value_bits, keys.shape[3], key_parts, value_parts, lengths, pairs)


def quantize_pack_reference(
    fmt: str,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    lengths: Tensor,
    key_bits: int,
    value_bits: int,
    centre: Tensor | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parts of keys and of values (see `Packed`), in plain torch."""
    kept_keys, kept_values = (x.reshape(-1, x.shape[3])[rows].float() for x in (keys, values))
    if fmt == "kivi":
        key_codes, key_parts = kivi.quantize_keys(kept_keys, lengths, key_bits)
        value_codes, value_parts = kivi.quantize_values(kept_values, value_bits)
    else:
        centre = rotated.centre(kept_keys, lengths) if centre is None else centre
        key_codes, key_parts = rotated.quantize_keys(kept_keys, lengths, key_bits, centre)
        value_codes, value_parts = rotated.quantize_values(kept_values, value_bits)
    return (
        {"words": bitpack.pack(key_codes, key_bits), **key_parts},
        {"words": bitpack.pack(value_codes, value_bits), **value_parts},
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
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`quantize_pack_reference` by the kernels."""
    from ib_kernels import kivi_triton, rotated_triton

    if keys.shape[3] % 16 or keys.shape[3] > MOST_CHANNELS:
        raise ValueError(f"the GPU kernels need a head_dim that is a multiple of 16 up to {MOST_CHANNELS}, got {keys.shape[3]}")
    if fmt == "kivi":
        key_parts = kivi_triton.pack_keys(keys, rows, lengths, key_bits)
        return key_parts, kivi_triton.pack_values(values, rows, lengths, value_bits)
    centre = rotated_triton.centre(keys, rows, lengths) if centre is None else centre
    key_parts = rotated_triton.pack(keys, rows, lengths, key_bits, centre)
    return key_parts, rotated_triton.pack(values, rows, lengths, value_bits, None)


def _check(
    fmt: str,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    key_bits: int,
    value_bits: int,
    centre: Tensor | None,
) -> None:
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}: use one of {list(FORMATS)}")
    for bits in (key_bits, value_bits):
        if bits not in bitpack.PLANES:
            raise ValueError(f"cannot quantize to {bits} bits: use one of {list(bitpack.PLANES)}")
    if keys.ndim != 4 or keys.shape != values.shape:
        raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} must both be [B, H_kv, T, D]")
    if keys.dtype not in DTYPES or values.dtype not in DTYPES:
        raise ValueError(f"keys and values must be of {list(DTYPES)}, got {keys.dtype} and {values.dtype}")
    if keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError("the channels of a token must be contiguous: call .contiguous() on keys and values")
    if rows.dtype != torch.int64 or rows.ndim != 1 or not rows.is_contiguous():
        raise ValueError(f"rows must be a contiguous int64 vector, got {rows.dtype} {list(rows.shape)}")
    if lengths.dtype != torch.int32 or pairs.dtype != torch.int32 or lengths.shape != pairs.shape:
        raise ValueError(f"lengths and pairs must be int32 [P], got {lengths.dtype} {list(lengths.shape)}, {pairs.dtype}")
    if centre is not None and (centre.dtype != torch.float16 or centre.shape != (lengths.shape[0], keys.shape[3])):
        raise ValueError(f"centre must be fp16 [P, D], got {centre.dtype} {list(centre.shape)}")
    tensors = [values, rows, lengths, pairs] + ([] if centre is None else [centre])
    if any(tensor.device != keys.device for tensor in tensors):
        raise ValueError("keys, values, rows, lengths, pairs and centre must be on one device")
    ragged.check(rows, lengths)
    tokens = keys.shape[:3].numel()
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < tokens:
        raise ValueError(f"rows must lie in [0, {tokens}), the tokens of keys, got {int(rows.min())} to {int(rows.max())}")
