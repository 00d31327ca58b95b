"""Compression backend: bit packing, ragged batches, quantization, and attention over what a compressed cache holds.

Plain torch on a CPU; on a GPU the kernels of the modules whose names end in _triton, which are imported when first needed
(see `backends`). A storage format is one file, with its quantizers, and one row in `formats.FORMATS`.
Depends on torch and Triton only.
"""

from ib_kernels.attention import merge, partial_attention
from ib_kernels.bitpack import pack, unpack, words_per_token
from ib_kernels.decoding import Window, packed_attention
from ib_kernels.packed import Packed, unpack_tokens
from ib_kernels.packing import quantize_pack
from ib_kernels.planning import Plan, plan
from ib_kernels.ragged import pad

__all__ = [
    "Packed",
    "Plan",
    "Window",
    "merge",
    "pack",
    "packed_attention",
    "pad",
    "partial_attention",
    "plan",
    "quantize_pack",
    "unpack",
    "unpack_tokens",
    "words_per_token",
]
