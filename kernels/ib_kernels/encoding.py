"""From numbers to codes and metadata, and back: all that is quantized in plain torch goes through here."""

from __future__ import annotations

import torch
from ib_kernels import ragged
from ib_kernels.bases import Bases, turn
from ib_kernels.formats import get_format
from ib_kernels.formats.format import RAW_BITS, Quantizer, Side, SideName, check_precision, saturating
from torch import Tensor


def encode(
    quantizer: Quantizer, x: Tensor, lengths: Tensor, bits: int, dtype: torch.dtype = torch.float16, fitted: Side | None = None
) -> tuple[Tensor, Side]:
    """Codes uint8 [N, D] and metadata of rows x [N, D], runs of lengths [P] one after the other.

    At 16 bits the codes are the numbers themselves as `dtype`, those beyond its range saturated, and there is no metadata.
    `fitted` is what the runs keep from their first tokens; by default these are the first.
    """
    x = x.float()
    if bits == RAW_BITS:
        return saturating(x, dtype), {}
    return quantizer.quantize(x, lengths, bits, quantizer.fit(x, lengths) if fitted is None else fitted)


def decode(quantizer: Quantizer, codes: Tensor, metadata: Side, lengths: Tensor, bits: int) -> Tensor:
    """The values fp32 [N, D] that codes and metadata from `encode` stand for."""
    return codes.float() if bits == RAW_BITS else quantizer.dequantize(codes, metadata, lengths, bits)


@torch.no_grad()
def roundtrip(
    format_name: str,
    side: SideName,
    x: Tensor,
    lengths: Tensor,
    bits: int,
    dtype: torch.dtype = torch.float16,
    bases: Bases | None = None,
) -> Tensor:
    """Keys or values x [N, D], runs of lengths [P] one after the other, as they are after quantization: fp32 [N, D].

    Bit for bit what `PackedTokens.unpack` gives for the same runs; `bits` = 16 rounds to `dtype`.
    `bases` has the matrices of each run [P, D, D], which count only for keys of formats that are stored in them.
    Raises ValueError for an unknown format, precision or dtype.
    """
    check_precision(bits, dtype)
    if not x.is_floating_point() or x.ndim != 2:
        raise ValueError(f"expected floats [N, D], got {x.dtype} {list(x.shape)}")
    ragged.check(x, lengths)
    quantizer: Quantizer = getattr(get_format(format_name), side)
    if bases is None or not in_bases(format_name, side, bits):
        codes, metadata = encode(quantizer, x, lengths, bits, dtype)
        return decode(quantizer, codes, metadata, lengths, bits)
    codes, metadata = encode(quantizer, turn(x, lengths, bases.into), lengths, bits, dtype)
    return turn(decode(quantizer, codes, metadata, lengths, bits), lengths, bases.back)


def in_bases(format_name: str, side: SideName, bits: int) -> bool:
    """Whether such numbers are stored in the coordinates of a basis, where there is one."""
    return side == "keys" and bits != RAW_BITS and get_format(format_name).turns_keys
