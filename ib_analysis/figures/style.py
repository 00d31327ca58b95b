"""One look for all figures, and one way to write them: PDF, PNG and exactly the plotted table as CSV."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ib_analysis.files import write_whole

COLUMN_INCHES = 3.03  # of an ACL paper
PAGE_INCHES = 6.3
SHOWN_DPI, MAX_PIXELS = 150, 3000  # in a notebook
RC: dict[Any, Any] = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "ib_analysis",
    "figure.constrained_layout.use": True,
}
COLORS = sns.color_palette("colorblind").as_hex()
MARKERS, LINES = "os^DvP*X", ("-", "--", ":", "-.")
ORDER = ("optimal", "uniform", "quantized pruning", "prune-only", "quantize-only")  # the same look in all figures; then others


class Look(NamedTuple):
    """How a series is drawn, to be told apart in grey, too."""

    color: str
    marker: str
    linestyle: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each different name."""
    different = sorted(dict.fromkeys(names), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    return {
        name: Look(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)]) for i, name in enumerate(different)
    }


class ShownFigure(Figure):
    """One that notebooks show whether or not a backend of matplotlib's has been chosen in them."""

    def _repr_png_(self) -> bytes:
        png = BytesIO()
        with mpl.rc_context(RC):
            self.savefig(png, format="png", dpi=min(SHOWN_DPI, MAX_PIXELS / max(self.get_size_inches())))
        return png.getvalue()


def new_figure(columns: int, width_inches: float, height_inches: float) -> Figure:
    """A figure with a row of axes, outside of pyplot: nothing to close, no window."""
    with mpl.rc_context(RC):
        figure = ShownFigure(figsize=(width_inches, height_inches), dpi=300)
        FigureCanvasAgg(figure)  # one for all: without it every tick label gets, and keeps, a canvas of its own
        figure.subplots(1, columns)
    return figure


def draw_losses(axes: Axes, table: pd.DataFrame, rate: str, series_looks: Mapping[str, Look], series: str) -> None:
    """A line of kl_bits against the column `rate` for each value of the column `series`, with intervals low_bits to high_bits."""
    for name, look in series_looks.items():
        some = table[table[series] == name].sort_values(rate)
        spread = [some.kl_bits - some.low_bits, some.high_bits - some.kl_bits]
        axes.errorbar(some[rate], some.kl_bits, spread, **look._asdict(), capsize=2, label=name)
    axes.set_yscale("log")


def save_figure(figure: Figure, table: pd.DataFrame, path: str | Path | None) -> Figure:
    """The figure; with a path also written to path.pdf, path.png and path.csv. The same figure gives the same bytes."""
    if path is None:
        return figure
    stem = Path(path)
    suffixes = (".pdf", ".png", ".csv")
    name = stem.stem if stem.suffix in suffixes else stem.name  # budget_0.125 is a whole name
    pdf, png, csv = (stem.with_name(name + suffix) for suffix in suffixes)
    with mpl.rc_context(RC):
        write_whole(pdf, lambda path: figure.savefig(path, format="pdf", metadata={"CreationDate": None}))
        write_whole(png, lambda path: figure.savefig(path, format="png", metadata={"Software": None}))
    write_whole(csv, lambda path: table.to_csv(path, index=False))
    return figure
