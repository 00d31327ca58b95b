"""More tokens in lower layers, at 4 bits: a policy that is not uniform, in one file."""

from collections.abc import Iterator

from ib_analysis.cache.plan import HeadPlan, Tier
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.policies import Cell

STEPS = 64


def pyramid(spec: CacheSpec, limit: ByteLimit) -> Iterator[Cell]:
    """Shares of tokens that fall linearly to a third of the first layer's; the widest that fits."""
    layers = spec.shape.layers
    for step in range(STEPS, 0, -1):
        shares = [step / STEPS * (1 - 2 / 3 * i / max(1, len(layers) - 1)) for i in range(len(layers))]
        plans = tuple(
            None if layer.sliding_window else (HeadPlan("rotated", (Tier(share, 4, 4),)),) * layer.kv_heads
            for layer, share in zip(layers, shares)
        )
        if limit.excess(plans) == 0:
            yield Cell(plans, "pyramid", f"{shares[0]:.0%} to {shares[-1]:.0%} of tokens at 4 bits")
            return
