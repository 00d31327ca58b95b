"""What storing keys, or values, in each format loses, against stored bits."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from ib_analysis.figures.style import PAGE_INCHES, RC, looks, new_figure, save_figure


def draw_formats(table: pd.DataFrame, path: str | Path | None = None) -> Figure:
    """Columns side, format, stored_bits (metadata included), kl_bits, low_bits, high_bits; one axes a side.

    With `path` also written there.
    """
    sides = list(dict.fromkeys(table.side))
    figure = new_figure(len(sides), PAGE_INCHES, 2.6)
    with rc_context(RC):
        for axes, side in zip(figure.axes, sides):
            of_side = table[table.side == side]
            for fmt, look in looks(table.format).items():
                some = of_side[of_side.format == fmt].sort_values("stored_bits")
                spread = [some.kl_bits - some.low_bits, some.high_bits - some.kl_bits]
                axes.errorbar(some.stored_bits, some.kl_bits, spread, **look._asdict(), capsize=2, label=fmt)
            axes.set_yscale("log")
            axes.set_xlabel("stored bits per number")
            axes.set_title(f"{side} stored, all else at 16 bits")
        figure.axes[0].set_ylabel("loss (bits per predicted token)")
        figure.axes[0].legend(frameon=False)
    return save_figure(figure, table, path)
