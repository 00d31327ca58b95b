"""Bit packing of integer codes into 16-bit words.

A token's D channels are padded to Dp, a multiple of 16. With f = 16 // bits fields a word, field s of word j (bits
s * bits and up) is channel s * (Dp / f) + j: every field position is one contiguous stripe of channels. A 3-bit code is
stored as two planes, the low two bits first, then the high bit, because 3 does not divide 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits of a code -> bits of each plane, lowest plane first
CHANNELS_PER_BLOCK = 16


def words_per_token(head_dim: int, bits: int) -> int:
    """Number of int16 words that hold the codes of one token of `head_dim` channels.

    Raises ValueError if `bits` is not 2, 3, 4 or 8.
    """
    _planes(bits)
    return _padded(head_dim) * bits // 16


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes [N, D] in [0, 2**bits) into int16 words [N, words_per_token(D, bits)].

    Raises ValueError if `bits` is not 2, 3, 4 or 8, or if the codes are not a matrix of integers in that range.
    """
    planes = _planes(bits)
    _check_codes(codes, bits)
    channels = _padded(codes.shape[1])
    codes = torch.nn.functional.pad(codes, (0, channels - codes.shape[1]))  # [N, Dp]
    words, shift = [], 0
    for plane_bits in planes:
        words.append(_pack_plane((codes >> shift) & (2**plane_bits - 1), plane_bits))
        shift += plane_bits
    return torch.cat(words, dim=1)


def unpack(words: Tensor, bits: int, head_dim: int) -> Tensor:
    """Unpack int16 words [N, words_per_token(head_dim, bits)] into uint8 codes [N, head_dim].

    Raises ValueError if `bits` is not 2, 3, 4 or 8, or if the words do not fit `bits` and `head_dim`.
    """
    planes = _planes(bits)
    width = words_per_token(head_dim, bits)
    if words.dtype != torch.int16 or words.ndim != 2 or words.shape[1] != width:
        raise ValueError(
            f"expected int16 words [N, {width}] for {bits} bits and head_dim {head_dim}, "
            f"got {words.dtype} {list(words.shape)}: pass the output of pack with the same bits and head_dim"
        )
    channels = _padded(head_dim)
    codes = torch.zeros(words.shape[0], channels, dtype=torch.uint8, device=words.device)
    first_word, shift = 0, 0
    for plane_bits in planes:
        last_word = first_word + channels * plane_bits // 16
        codes |= _unpack_plane(words[:, first_word:last_word], plane_bits) << shift
        first_word, shift = last_word, shift + plane_bits
    return codes[:, :head_dim].contiguous()


def _pack_plane(codes: Tensor, bits: int) -> Tensor:
    fields = 16 // bits
    stripes = codes.to(torch.int16).chunk(fields, dim=1)  # fields x [N, Dp / fields]
    words = stripes[0].clone()
    for field in range(1, fields):
        words |= stripes[field] << (field * bits)
    return words


def _unpack_plane(words: Tensor, bits: int) -> Tensor:
    # The shift of an int16 copies the sign bit; the mask removes the copies.
    stripes = [((words >> shift) & (2**bits - 1)).to(torch.uint8) for shift in range(0, 16, bits)]
    return torch.cat(stripes, dim=1)  # [N, Dp]


def _padded(head_dim: int) -> int:
    return -(-head_dim // CHANNELS_PER_BLOCK) * CHANNELS_PER_BLOCK


def _planes(bits: int) -> tuple[int, ...]:
    if bits not in PLANES:
        raise ValueError(f"cannot pack {bits}-bit codes: use one of {sorted(PLANES)} bits")
    return PLANES[bits]


def _check_codes(codes: Tensor, bits: int) -> None:
    if codes.ndim != 2:
        raise ValueError(f"expected codes [N, D], got shape {list(codes.shape)}: flatten all but the channels")
    if codes.dtype == torch.bool or codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"expected integer codes, got {codes.dtype}: round and convert them to uint8 first")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes must lie in [0, {2**bits}) for {bits} bits: clamp them first")
