"""The exact bytes that packed tokens take."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from ib_kernels.formats import get_format
from ib_kernels.formats.format import ITEM_BYTES, Quantizer, check_precision, layout, row_count
from numpy.typing import NDArray

RUN_BYTES = 8  # of a run: its number of tokens and its pair, int32 each


@overload
def tokens_nbytes(format_name: str, tokens: int, head_dim: int, key_bits: int, value_bits: int) -> int: ...
@overload
def tokens_nbytes(
    format_name: str, tokens: NDArray[np.integer[Any]], head_dim: int, key_bits: int, value_bits: int
) -> NDArray[np.int64]: ...
def tokens_nbytes(
    format_name: str, tokens: int | NDArray[np.integer[Any]], head_dim: int, key_bits: int, value_bits: int
) -> int | NDArray[np.int64]:
    """Exact bytes of one run of `tokens` tokens in `PackedTokens`, its length and pair included.

    `tokens` may be an integer array, for the bytes of one run of each count.
    Raises ValueError for an unknown format or precision, or for counts that are negative or no integers.
    """
    counts = np.asarray(tokens)
    if not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise ValueError("tokens must be counts: pass integers of at least 0")
    fmt = get_format(format_name)
    counts = counts.astype(np.int64)
    nbytes = side_nbytes(fmt.keys, counts, head_dim, key_bits) + side_nbytes(fmt.values, counts, head_dim, value_bits)
    return nbytes + RUN_BYTES if isinstance(tokens, np.ndarray) else int(nbytes) + RUN_BYTES


def side_nbytes(quantizer: Quantizer, tokens: NDArray[np.int64], head_dim: int, bits: int) -> NDArray[np.int64]:
    """Exact bytes of the keys, or of the values, of one run of each number of tokens, its length and pair left out."""
    check_precision(bits)
    total = np.zeros_like(tokens)
    for rows in layout(quantizer, bits, head_dim).values():
        total = total + row_count(rows.tokens_per_row, tokens) * (rows.width * ITEM_BYTES)
    return total
