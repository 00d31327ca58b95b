"""Compression backend: bit packing, ragged batches, quantization, packed storage, and attention over what it holds.

Plain torch on a CPU; on a GPU the kernels of the modules whose names end in _triton and of each format's folder, which are
imported when first needed (see `backends`). A storage format is one folder, with its quantizers and its kernels, if it has any,
and one row in `formats.FORMATS`. Depends on torch, NumPy and Triton only.
"""

from ib_kernels.attention import merge, partial_attention
from ib_kernels.bases import Bases, turn
from ib_kernels.bitpack import pack, unpack, words_per_token
from ib_kernels.decoding import Window, packed_attention
from ib_kernels.encoding import decode, encode, in_bases, roundtrip
from ib_kernels.formats import FORMATS, get_format
from ib_kernels.formats.format import RAW_BITS, Format, MetadataRows, Quantizer, SideName, Sides
from ib_kernels.nbytes import RUN_BYTES, side_nbytes, tokens_nbytes
from ib_kernels.packed import Packed, unpack_tokens
from ib_kernels.packed_tokens import PackedTokens
from ib_kernels.packing import quantize_pack
from ib_kernels.ragged import pad
from ib_kernels.scheduling import Schedule, schedule

__all__ = [
    "FORMATS",
    "RAW_BITS",
    "RUN_BYTES",
    "Bases",
    "Format",
    "MetadataRows",
    "Packed",
    "PackedTokens",
    "Quantizer",
    "Schedule",
    "SideName",
    "Sides",
    "Window",
    "decode",
    "encode",
    "get_format",
    "in_bases",
    "merge",
    "pack",
    "packed_attention",
    "pad",
    "partial_attention",
    "quantize_pack",
    "roundtrip",
    "schedule",
    "side_nbytes",
    "tokens_nbytes",
    "turn",
    "unpack",
    "unpack_tokens",
    "words_per_token",
]
