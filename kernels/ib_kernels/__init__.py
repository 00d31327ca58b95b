"""Compression backend: bit packing, ragged batches and attention over parts of a cache. Depends on torch only."""

from ib_kernels.attention import merge, partial_attention
from ib_kernels.bitpack import pack, unpack, words_per_token
from ib_kernels.ragged import interleave, pad, select, split

__all__ = ["interleave", "merge", "pack", "pad", "partial_attention", "select", "split", "unpack", "words_per_token"]
