"""Retained information against stored bits: the optimal allocation beside the best cell of each policy."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from ib_analysis.figures.style import COLUMN_INCHES, RC, looks, new_figure, save_figure


def draw_tradeoff(table: pd.DataFrame, path: str | Path | None = None) -> Figure:
    """Columns policy, bits_per_token (stored, metadata included), retained_bits, low_bits, high_bits, information_bits.

    The dashed line is what the full cache carries; below zero the compressed cache misleads. With `path` also written there.
    """
    figure = new_figure(1, COLUMN_INCHES, 2.3)
    with rc_context(RC):
        axes = figure.axes[0]
        axes.axhline(table.information_bits.mean(), color="0.5", linewidth=0.8, linestyle="--", label="full cache")
        axes.axhline(0, color="0.8", linewidth=0.8)
        for policy, look in looks(table.policy).items():
            some = table[table.policy == policy].sort_values("bits_per_token")
            spread = [some.retained_bits - some.low_bits, some.high_bits - some.retained_bits]
            axes.errorbar(some.bits_per_token, some.retained_bits, spread, **look._asdict(), capsize=2, label=policy)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("stored bits per context token")
        axes.set_ylabel("retained (bits per predicted token)")
        axes.legend(frameon=False)
    return save_figure(figure, table, path)
