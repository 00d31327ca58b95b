"""What storing keys, or values, in each format loses, against stored bits."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from ib_analysis.figures.style import PAGE_INCHES, RC, draw_losses, looks, new_figure, save_figure


def draw_formats(table: pd.DataFrame, path: str | Path | None = None) -> Figure:
    """Columns side, format, stored_bits (metadata included), kl_bits, low_bits, high_bits; one axes a side.

    With `path` also written there.
    """
    sides = list(dict.fromkeys(table.side))
    figure = new_figure(len(sides), PAGE_INCHES, 2.6)
    with rc_context(RC):
        for axes, side in zip(figure.axes, sides):
            draw_losses(axes, table[table.side == side], "stored_bits", looks(table.format), "format")
            axes.set_xlabel("stored bits per number")
            axes.set_title(f"{side} stored, all else at 16 bits")
        figure.axes[0].set_ylabel("loss (bits per predicted token)")
        figure.axes[0].legend(frameon=False)
    return save_figure(figure, table, path)
