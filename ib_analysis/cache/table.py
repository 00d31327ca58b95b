"""Plans as a table."""

from __future__ import annotations

import pandas as pd

from ib_analysis.cache.plan import Plans, plan_of
from ib_analysis.cache.spec import CacheSpec

COLUMNS = ["layer", "head", "tier", "format", "token_share", "key_bits", "value_bits", "head_bytes"]


def tier_table(spec: CacheSpec, plans: Plans, context_length: int) -> pd.DataFrame:
    """One row for each tier of each head, with the head's bytes at a context length."""
    tokens = spec.recent.compressible(context_length)
    rows = []
    for i, h in spec.shape.heads:
        layer, plan = spec.shape.layers[i], plan_of(plans, (i, h))
        if plan is None:
            rows.append((i, h, 0, "full", 1.0, 16, 16, tokens * layer.bytes_per_token // layer.kv_heads))
        elif not plan.tiers:
            rows.append((i, h, 0, "evicted", 0.0, 0, 0, 0))
        else:
            nbytes = plan.nbytes(tokens, layer.head_dim)
            for t, tier in enumerate(plan.tiers):
                rows.append((i, h, t, plan.format, tier.token_share, tier.key_bits, tier.value_bits, nbytes))
    return pd.DataFrame(rows, columns=COLUMNS)
