"""What a cache keeps: tiers of tokens and bits for every KV head, and the tokens that are never compressed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ib_analysis.formats.packed import tokens_nbytes
from ib_analysis.shape import CacheShape, LayerShape

LONGEST = 8  # budgets are checked up to this many times the context length; beyond, fixed costs are an ever smaller share

Count = TypeVar("Count", int, NDArray[np.int64])


@dataclass(frozen=True)
class Tier:
    """A share of a head's compressible tokens, stored at these precisions (2, 3, 4, 8, or 16 for none)."""

    share: float
    key_bits: int
    value_bits: int


@dataclass(frozen=True)
class HeadPlan:
    """Tiers of one KV head, the tokens that score highest in the first; what no tier takes is evicted."""

    format: str
    tiers: tuple[Tier, ...] = ()

    def counts(self, tokens: Count) -> list[Count]:
        """How many of `tokens` compressible tokens each tier takes.

        A tier takes its share of what the tiers before it left. So when tokens are added, no count falls, and all counts
        together grow by no more than what was added: a longer cache never needs a token back that it has evicted.
        """
        counts: list[Count] = []
        left, left_share = tokens, 1.0
        for tier in self.tiers:
            share = min(1.0, tier.share / left_share) if left_share > 0 else 0.0
            count = np.floor(share * np.asarray(left) + 1e-9).astype(np.int64)
            counts.append(int(count) if isinstance(tokens, int) else count)
            left = left - counts[-1]
            left_share -= tier.share
        return counts

    def nbytes(self, tokens: Count, head_dim: int) -> Count:
        """Exact bytes of this head in a cache with `tokens` compressible tokens."""
        total = tokens * 0
        for tier, count in zip(self.tiers, self.counts(tokens)):
            total = total + tokens_nbytes(self.format, count, head_dim, tier.key_bits, tier.value_bits)
        return total * (tokens > 0)  # nothing is stored before there is anything to compress

    @property
    def kept_share(self) -> float:
        return sum(tier.share for tier in self.tiers)


Plans = tuple[tuple[HeadPlan, ...] | None, ...]  # one row for each layer; None for a layer that is left as it is


@dataclass(frozen=True)
class Pinned:
    """Tokens kept at 16 bits in every head: the first `sinks` ones, and at least `window` recent ones.

    Tokens leave the window `flush` at a time, at the same lengths whether they came in one block or one by one.
    """

    sinks: int
    window: int
    flush: int

    def compressible(self, length: Count) -> Count:
        """How many tokens of a cache of `length` tokens are compressible."""
        beyond = np.maximum(np.asarray(length) - self.sinks - self.window, 0) // self.flush * self.flush
        return int(beyond) if isinstance(length, int) else beyond

    def nbytes(self, length: Count, layer: LayerShape) -> Count:
        """Bytes that one layer's pinned tokens take."""
        return (length - self.compressible(length)) * layer.bytes_per_token

    def before_leaving(self, length: int) -> int:
        """The first length from this one on at which one more token makes some leave the window."""
        return length + (self.most - length) % self.flush

    @property
    def most(self) -> int:
        """The largest number of pinned tokens."""
        return self.sinks + self.window + self.flush - 1


def plans_nbytes(shape: CacheShape, plans: Plans, pinned: Pinned, length: Count) -> Count:
    """Exact bytes of one sequence of `length` tokens in the compressible layers, at 16 bits in those left as they are."""
    tokens = pinned.compressible(length)
    total = length * 0
    for layer, heads in zip(shape.layers, plans):
        if heads is not None:
            total = total + pinned.nbytes(length, layer)
        elif not layer.sliding_window:
            total = total + length * layer.bytes_per_token
    alike = Counter((plan, layer.head_dim) for layer, heads in zip(shape.layers, plans) for plan in heads or ())
    for (plan, head_dim), heads_alike in alike.items():
        total = total + heads_alike * plan.nbytes(tokens, head_dim)
    return total


def excess_bytes(shape: CacheShape, plans: Plans, pinned: Pinned, share: float, context_length: int) -> int:
    """By how much the cache exceeds `share` of the full 16-bit cache at most, from a context length on; 0 if it does not.

    Tokens leave the window some at a time, and kivi stores groups of keys whole: a cache that fits at one length may be
    too large at the next.
    """
    # The cache grows faster than the budget until tokens leave the window: only the lengths just before that matter.
    lengths = np.arange(pinned.before_leaving(context_length), LONGEST * context_length + pinned.flush, pinned.flush)
    excess = plans_nbytes(shape, plans, pinned, lengths) - share * shape.bytes_per_token * lengths
    return max(0, int(np.ceil(excess.max())))
