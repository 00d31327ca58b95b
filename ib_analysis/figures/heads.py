"""What every head was given: tokens kept, key bits and value bits, layer by head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.figure import Figure

from ib_analysis.figures.style import PAGE_INCHES, RC, new_figure, save_figure

TALLEST_INCHES = 8.2  # of a page
MAX_NUMBERS = 96  # cells; beyond, numbers would not fit
PANELS = (("token_share", "tokens kept (share)", 0, 1), ("key_bits", "key bits", 0, 8), ("value_bits", "value bits", 0, 8))


def head_table(tiers: pd.DataFrame) -> pd.DataFrame:
    """One row for each head from one row for each tier, as `Allocation.table` has them; bits are means over kept tokens."""
    rows = []
    for (layer, head), part in tiers.groupby(["layer", "head"]):
        share = float(part.token_share.sum())
        bits = [
            float(np.average(part[name], weights=part.token_share)) if share > 0 else float("nan")
            for name in ("key_bits", "value_bits")
        ]
        rows.append((layer, head, share, *bits))
    return pd.DataFrame(rows, columns=["layer", "head", "token_share", "key_bits", "value_bits"])


def draw_heads(tiers: pd.DataFrame, path: str | Path | None = None) -> Figure:
    """Three heatmaps, layer by KV head, of the `head_table` of these tiers; with `path` also written there.

    Heads that keep nothing have no bits.
    """
    heads = head_table(tiers)
    layers = heads.layer.nunique()
    figure = new_figure(3, PAGE_INCHES, 0.8 + min(max(1.0, 0.25 * layers), TALLEST_INCHES))
    with rc_context(RC):
        for axes, (name, title, low, high) in zip(figure.axes, PANELS):
            sns.heatmap(
                heads.pivot(index="layer", columns="head", values=name),
                ax=axes,
                vmin=low,
                vmax=high,
                cmap="cividis",
                annot=len(heads) <= MAX_NUMBERS,
                fmt=".2g",
                linewidths=0.5,
                annot_kws={"size": 7},
            )
            axes.set_title(title)
            axes.set_xlabel("KV head")
            axes.set_ylabel("layer" if name == "token_share" else "")
    return save_figure(figure, heads, path)
