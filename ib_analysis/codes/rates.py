"""Rates of a compressed cache in bits per context token: what is stored, and what an entropy coder would store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from ib_kernels import RUN_BYTES, SideName, get_format, side_nbytes
from numpy.typing import NDArray
from scipy.special import gammaln

from ib_analysis.cache.plan import QUANTIZED_FORM, RAW, Head, HeadPlan, Plans, Tier, plan_of
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.codes.gathered import SIDES, Gathered, TierSide, sides_of
from ib_analysis.model.shape import ELEMENT_BYTES


@dataclass(frozen=True)
class Rate:
    """Bits per context token.

    `code_bits` is the memoryless code rate: entropies of the codes of each channel, side information as it is stored, and
    which tokens were kept. `tight_bits` is less by what channels share if they are Gaussian. Sinks and windows are stored
    but not counted in either: they are given, not compressed.
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


class CodeRates:
    """Rates of plans on prompts of these lengths, from what was gathered on them."""

    def __init__(
        self,
        spec: CacheSpec,
        lengths: Sequence[int],
        sides: Mapping[TierSide, Sequence[Head]],
        gathered: Mapping[TierSide, Gathered],
    ) -> None:
        self.shape = spec.shape
        self.lengths = np.array(lengths, dtype=np.int64)
        self.tokens: NDArray[np.int64] = spec.recent.compressible(self.lengths)  # of each prompt
        self.past_window: NDArray[np.int64] = spec.recent.past_window(self.lengths)
        self._token_bits: dict[tuple[TierSide, Head], tuple[float, float]] = {}  # entropy of the codes, what channels share
        for side, found in gathered.items():
            shared = found.total_correlation_bits().nan_to_num(0)
            rows = zip(sides[side], found.code_entropy_bits().tolist(), shared.tolist())
            self._token_bits.update({(side, head): (entropy, common) for head, entropy, common in rows})

    def total(self, plans: Plans) -> Rate:
        """Rate of the whole cache."""
        total = Rate(0.0, 0.0, 0.0, 0.0)
        for head in self.shape.heads:
            for side in SIDES:
                total += self.of(plan_of(plans, head), head, side)
        return total

    def of(self, head_plan: HeadPlan | None, head: Head, side: SideName) -> Rate:
        """Rate of one head's keys or values under a plan, None for full precision.

        What keys and values share, the mask and a length, is counted with the keys.
        """
        plan, dim = head_plan or RAW, self.shape.layers[head[0]].head_dim
        counts = plan.counts(self.tokens)
        entropy = tight = metadata = stored = 0.0
        for count, tier, sides in zip(counts, plan.tiers, sides_of(plan)):
            token_bits, common = self._token_bits.get((sides[side], head), (0.0, 0.0))
            entropy += float(count.sum()) * token_bits
            tight += float(count.sum()) * (token_bits - min(common, token_bits))
            bits = _stored_bits(plan.format, tier, side, count, dim) * (self.tokens > 0)
            stored += float(bits.sum())
            metadata += float((bits - count * dim * sides[side].bits).sum())
        mask = float(_mask_bits(self.tokens, counts).sum()) if side == "keys" else 0.0
        if head_plan is None:
            stored, metadata = float(self.lengths.sum() * 8 * ELEMENT_BYTES * dim), 0.0
        else:
            stored += self._window_bits(side, dim)
        total = self.lengths.sum()
        return Rate(stored / total, entropy / total, (entropy + metadata + mask) / total, (tight + metadata + mask) / total)

    def _window_bits(self, side: SideName, dim: int) -> float:
        """Of a head's sinks and windows."""
        quantized = self.past_window - self.tokens
        bits = _stored_bits(QUANTIZED_FORM[0], Tier(1.0, *QUANTIZED_FORM[1:]), side, quantized, dim) * (quantized > 0)
        return float(((self.lengths - self.past_window) * 8 * ELEMENT_BYTES * dim + bits).sum())


def metadata_bits(plan: HeadPlan, tier: int, side: SideName, tokens: NDArray[np.int64], dim: int) -> float:
    """Scales, minima and the like of one tier, as they are stored, over prompts with these compressible tokens."""
    count = plan.counts(tokens)[tier]
    bits = plan.tiers[tier].key_bits if side == "keys" else plan.tiers[tier].value_bits
    return float(((_stored_bits(plan.format, plan.tiers[tier], side, count, dim) - count * dim * bits) * (tokens > 0)).sum())


def _stored_bits(fmt: str, tier: Tier, side: SideName, count: NDArray[np.int64], dim: int) -> NDArray[np.int64]:
    """Bits of runs of `count` tokens; keys carry the length of the run."""
    if side == "keys":
        return 8 * (side_nbytes(get_format(fmt).keys, count, dim, tier.key_bits) + RUN_BYTES)
    return 8 * side_nbytes(get_format(fmt).values, count, dim, tier.value_bits)


def _mask_bits(tokens: NDArray[np.int64], counts: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """log2 of the number of ways to deal tokens to tiers of these counts, the rest evicted."""
    rest = tokens - sum(counts)
    ways = gammaln(tokens + 1) - sum(gammaln(count + 1) for count in [*counts, rest])
    bits: NDArray[np.float64] = np.maximum(ways, 0) / log(2)
    return bits
