"""What a head may be given: the options among which the optimizer chooses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from ib_analysis.cache.plan import EVICTED, FULL, HeadPlan, Tier, precisions

SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
FIRST_TIERS = (Tier(1 / 32, 8, 8), Tier(1 / 16, 4, 4), Tier(1 / 8, 4, 4), Tier(1 / 4, 4, 4))
SECOND_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)


def head_options(formats: Sequence[str]) -> list[HeadPlan]:
    """Nothing; one tier of any share, key bits, value bits and format; a few pairs of tiers. The order is fixed."""
    one = [HeadPlan(fmt, (Tier(share, *bits),)) for fmt, bits in precisions(formats) for share in SHARES]
    two = [
        HeadPlan(fmt, (first, Tier(share, 2, 2)))
        for fmt, first, share in product(formats, FIRST_TIERS, SECOND_SHARES)
        if first.token_share + share <= 1
    ]
    return [EVICTED, *one, *two]


def dominates(better: HeadPlan, worse: HeadPlan) -> bool:
    """Whether `better` has everything that `worse` has: the same format, no smaller tier anywhere."""
    if not worse.tiers or not better.tiers:
        return not worse.tiers
    if better.format != worse.format and any((t.key_bits, t.value_bits) != FULL for t in worse.tiers):
        return False
    if len(better.tiers) < len(worse.tiers):
        share, bits = worse.kept_share, max(max(t.key_bits, t.value_bits) for t in worse.tiers)
        tier = better.tiers[0]
        return tier.token_share >= share and min(tier.key_bits, tier.value_bits) >= bits
    return all(
        a.token_share >= b.token_share and a.key_bits >= b.key_bits and a.value_bits >= b.value_bits
        for a, b in zip(better.tiers, worse.tiers)
    )
