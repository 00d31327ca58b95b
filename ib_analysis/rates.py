"""Rates of a compressed cache in bits per context token: what is stored, and what an entropy coder would store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from ib_analysis.calibration import Replays
from ib_analysis.formats import FORMATS, RAW_BITS, get_format
from ib_analysis.formats.packed import RUN_BYTES, side_nbytes
from ib_analysis.pieces import PARTS, Gathered, Part, Piece, pieces_of
from ib_analysis.plan import HeadPlan, Pinned, Plans, Tier
from ib_analysis.shape import ELEMENT_BYTES, CacheShape

Head = tuple[int, int]  # layer, KV head
RAW = HeadPlan(next(iter(FORMATS)), (Tier(1.0, RAW_BITS, RAW_BITS),))  # what a head at full precision holds


@dataclass(frozen=True)
class Rate:
    """Bits per context token.

    `code_bits` is the memoryless code rate: entropies of the codes of each channel, side information as it is stored, and
    which tokens were kept. `tight_bits` is less by what channels share if they are Gaussian. Pinned tokens are stored but
    not counted in either: they are given, not compressed.
    """

    stored_bits: float
    entropy_bits: float  # of the codes alone
    code_bits: float
    tight_bits: float

    def __add__(self, other: Rate) -> Rate:
        return Rate(
            self.stored_bits + other.stored_bits,
            self.entropy_bits + other.entropy_bits,
            self.code_bits + other.code_bits,
            self.tight_bits + other.tight_bits,
        )


def all_pieces(plans: Iterable[Plans], shape: CacheShape) -> dict[Piece, list[Head]]:
    """Every piece that some of these plans store, with the heads that do."""
    found: dict[Piece, dict[Head, None]] = {}
    for rows in plans:
        for head in shape.heads:
            for tier in pieces_of(plan_of(rows, head) or RAW):
                for piece in tier.values():
                    found.setdefault(piece, {})[head] = None
    return {piece: sorted(heads) for piece, heads in found.items()}


def plan_of(plans: Plans, head: Head) -> HeadPlan | None:
    """The plan of one head; None in a layer that is left at full precision."""
    row = plans[head[0]]
    return None if row is None else row[head[1]]


class CodeRates:
    """Rates of plans on prompts of these lengths, from pieces gathered on them."""

    def __init__(
        self,
        shape: CacheShape,
        pinned: Pinned,
        lengths: Sequence[int],
        pieces: Mapping[Piece, Sequence[Head]],
        gathered: Mapping[Piece, Gathered],
    ) -> None:
        self.shape, self.pinned = shape, pinned
        self.lengths = np.array(lengths, dtype=np.int64)
        self.tokens: NDArray[np.int64] = pinned.compressible(self.lengths)  # of each prompt
        self._token_bits: dict[tuple[Piece, Head], tuple[float, float]] = {}  # entropy of the codes, what channels share
        for piece, found in gathered.items():
            shared = found.total_correlation_bits().nan_to_num(0)
            rows = zip(pieces[piece], found.code_entropy_bits().tolist(), shared.tolist())
            self._token_bits.update({(piece, head): (entropy, common) for head, entropy, common in rows})

    def total(self, plans: Plans) -> Rate:
        """Rate of the whole cache."""
        total = Rate(0.0, 0.0, 0.0, 0.0)
        for head in self.shape.heads:
            for part in PARTS:
                total += self.of(plan_of(plans, head), head, part)
        return total

    def of(self, head_plan: HeadPlan | None, head: Head, part: Part) -> Rate:
        """Rate of one head's keys or values under a plan, None for full precision.

        What keys and values share, the mask and a length, is counted with the keys.
        """
        plan, dim = head_plan or RAW, self.shape.layers[head[0]].head_dim
        counts = plan.counts(self.tokens)
        entropy = tight = side = stored = 0.0
        for count, tier, pieces in zip(counts, plan.tiers, pieces_of(plan)):
            token_bits, common = self._token_bits.get((pieces[part], head), (0.0, 0.0))
            entropy += float(count.sum()) * token_bits
            tight += float(count.sum()) * (token_bits - min(common, token_bits))
            bits = _stored_bits(plan.format, tier, part, count, dim) * (self.tokens > 0)
            stored += float(bits.sum())
            side += float((bits - count * dim * pieces[part].bits).sum())
        mask = float(_mask_bits(self.tokens, counts).sum()) if part == "keys" else 0.0
        if head_plan is None:
            stored, side = float(self.lengths.sum() * 8 * ELEMENT_BYTES * dim), 0.0
        else:
            stored += float((self.lengths - self.tokens).sum() * 8 * ELEMENT_BYTES * dim)
        total = self.lengths.sum()
        return Rate(stored / total, entropy / total, (entropy + side + mask) / total, (tight + side + mask) / total)


def side_bits(plan: HeadPlan, tier: int, part: Part, tokens: NDArray[np.int64], dim: int) -> float:
    """Scales, minima and the like of one tier, as they are stored, over prompts with these compressible tokens."""
    count = plan.counts(tokens)[tier]
    bits = plan.tiers[tier].key_bits if part == "keys" else plan.tiers[tier].value_bits
    return float(((_stored_bits(plan.format, plan.tiers[tier], part, count, dim) - count * dim * bits) * (tokens > 0)).sum())


def context_lengths(replays: Replays) -> list[int]:
    """Tokens of each context."""
    return [len(episode.prefill) for episode in replays.episodes]


def _stored_bits(fmt: str, tier: Tier, part: Part, count: NDArray[np.int64], dim: int) -> NDArray[np.int64]:
    """Bits of runs of `count` tokens; keys carry the length of the run."""
    if part == "keys":
        return 8 * (side_nbytes(get_format(fmt).keys, count, dim, tier.key_bits) + RUN_BYTES)
    return 8 * side_nbytes(get_format(fmt).values, count, dim, tier.value_bits)


def _mask_bits(tokens: NDArray[np.int64], counts: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """log2 of the number of ways to deal tokens to tiers of these counts, the rest evicted."""
    rest = tokens - sum(counts)
    ways = gammaln(tokens + 1) - sum(gammaln(count + 1) for count in [*counts, rest])
    bits: NDArray[np.float64] = np.maximum(ways, 0) / log(2)
    return bits
