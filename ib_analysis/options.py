"""What a head may be given: the options among which the optimizer chooses."""

from __future__ import annotations

from itertools import product

from ib_analysis.formats import FORMATS
from ib_analysis.plan import HeadPlan, Tier

SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
BITS = (2, 3, 4, 8)
FULL = (16, 16)
FIRST_TIERS = (Tier(1 / 32, 8, 8), Tier(1 / 16, 4, 4), Tier(1 / 8, 4, 4), Tier(1 / 4, 4, 4))
SECOND_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)


def head_options() -> list[HeadPlan]:
    """Nothing; one tier of any share, key bits, value bits and format; a few pairs of tiers. The order is fixed."""
    evicted = HeadPlan(next(iter(FORMATS)))
    one = [HeadPlan(fmt, (Tier(share, *bits),)) for fmt, bits in precisions() for share in SHARES]
    two = [
        HeadPlan(fmt, (first, Tier(share, 2, 2)))
        for fmt, first, share in product(FORMATS, FIRST_TIERS, SECOND_SHARES)
        if first.share + share <= 1
    ]
    return [evicted, *one, *two]


def precisions() -> list[tuple[str, tuple[int, int]]]:
    """Every (format, (key bits, value bits)); at 16 bits there is nothing to format."""
    packed = [(fmt, bits) for fmt in FORMATS for bits in product(BITS, BITS)]
    return [*packed, (next(iter(FORMATS)), FULL)]


def dominates(better: HeadPlan, worse: HeadPlan) -> bool:
    """Whether `better` has everything that `worse` has: the same format, no smaller tier anywhere."""
    if not worse.tiers:
        return True
    if better.format != worse.format and any((t.key_bits, t.value_bits) != FULL for t in worse.tiers):
        return False
    if len(better.tiers) < len(worse.tiers):
        share, bits = worse.kept_share, max(max(t.key_bits, t.value_bits) for t in worse.tiers)
        tier = better.tiers[0] if better.tiers else Tier(0.0, 0, 0)
        return tier.share >= share and min(tier.key_bits, tier.value_bits) >= bits
    return all(
        a.share >= b.share and a.key_bits >= b.key_bits and a.value_bits >= b.value_bits
        for a, b in zip(better.tiers, worse.tiers)
    )
