"""Retained information against stored bits: the optimal allocation beside uniform ones."""

from __future__ import annotations

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from ib_analysis.figures.style import COLORS, COLUMN_INCHES, RC, new_figure

MARKS = {"optimal": ("o", "-"), "uniform": ("s", "--"), "prune-only": ("^", ":"), "quantize-only": ("D", "-.")}


def plot_tradeoff(table: pd.DataFrame) -> Figure:
    """Columns policy, bits_per_token (stored, metadata included), retained_bits, low_bits, high_bits, information_bits.

    The dashed line is what the full cache carries; below zero the compressed cache misleads.
    """
    figure = new_figure(1, COLUMN_INCHES, 2.3)
    with rc_context(RC):
        axes = figure.axes[0]
        axes.axhline(table.information_bits.mean(), color="0.5", linewidth=0.8, linestyle="--", label="full cache")
        axes.axhline(0, color="0.8", linewidth=0.8)
        for color, (policy, (marker, line)) in zip(COLORS, MARKS.items()):
            some = table[table.policy == policy].sort_values("bits_per_token")
            if some.empty:
                continue
            spread = [some.retained_bits - some.low_bits, some.high_bits - some.retained_bits]
            axes.errorbar(
                some.bits_per_token,
                some.retained_bits,
                spread,
                color=color,
                marker=marker,
                linestyle=line,
                capsize=2,
                label=policy,
            )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("stored bits per context token")
        axes.set_ylabel("retained (bits per predicted token)")
        axes.legend(frameon=False)
    return figure
