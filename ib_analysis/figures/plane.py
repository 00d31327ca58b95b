"""The information plane, and the local plane of one head under the Gaussian bottleneck."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ib_analysis.errors import CalibrationError
from ib_analysis.figures.style import PAGE_INCHES, RC, looks, new_figure, save_figure

RATES = (("stored_bits", "stored bits per context token"), ("code_rate_bits", "memoryless code rate (bits per context token)"))
POINTS = ("null point", "full point")  # which are no series


def draw_plane(points: pd.DataFrame, path: str | Path | None = None) -> Figure:
    """Retained information against stored bits, and against the code rate, of `Plane.points`; with `path` also written.

    Lines join the best cells of each family, dots are its other cells; what lies below the frame is in the table only. The
    null cache has no code rate, so it is on the left panel only.
    """
    figure = new_figure(2, PAGE_INCHES, 2.9)
    drawn = points[points.best]
    low, high = min(0.0, float(drawn.low_bits.min())), float(points.ceiling_high_bits.max())
    with rc_context(RC):
        for axes, (rate, label) in zip(figure.axes, RATES):
            _draw_limits(axes, points, rate)
            for family, look in looks(points.family[~points.family.isin(POINTS)]).items():
                some = points[points.family == family]
                axes.plot(some[rate], some.retained_bits, ".", color=look.color, markersize=2, alpha=0.35, zorder=1)
                some = some[some.best].sort_values(rate)
                spread = [some.retained_bits - some.low_bits, some.high_bits - some.retained_bits]
                axes.errorbar(some[rate], some.retained_bits, spread, **look._asdict(), capsize=2, label=family)
            axes.set_xscale("log", base=2)
            axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
            axes.set_xlabel(label)
        figure.axes[0].set_ylabel("retained (bits per predicted token)")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return save_figure(figure, points, path)


def _draw_limits(axes: Axes, points: pd.DataFrame, rate: str) -> None:
    """The ceiling (usable information of the full cache), zero, the null and the full cache, and random eviction between them."""
    null, full = (points[points.family == family].iloc[0] for family in POINTS)
    axes.axhspan(full.ceiling_low_bits, full.ceiling_high_bits, color="0.95", zorder=0)
    axes.axhline(full.information_bits, color="0.5", linewidth=0.8, linestyle="--", label="ceiling (usable information)")
    axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    smallest = points.loc[points[rate] > 0, rate].min()
    rates = np.geomspace(max(null[rate], smallest / 2), full[rate], 100)
    time_sharing = (rates - null[rate]) / (full[rate] - null[rate]) * full.retained_bits
    axes.plot(rates, time_sharing, color="0.3", linewidth=0.8, linestyle=(0, (1, 1)), label="random eviction (time sharing)")
    axes.plot(full[rate], full.retained_bits, "*", color="black", markersize=7, label="full cache", zorder=4)
    if null[rate] > 0:
        axes.plot(null[rate], null.retained_bits, "x", color="black", markersize=5, label="null: sinks and windows", zorder=4)


def draw_local_plane(local: pd.DataFrame, path: str | Path | None = None) -> Figure:
    """Keys and values of the head whose tokens say most about Y, from a `local_plane`: points under the bottleneck's curve.

    Crosses are floors, each on a line to the point whose error it has.

    With `path` the whole table is also written.

    Raises CalibrationError if the table is empty, as it is from too few tokens.
    """
    if local.empty:
        raise CalibrationError("there is no local plane: too few tokens were held out, pass more or longer prompts")
    best = local[local.kind == "bottleneck"].sort_values("relevance_bits").iloc[-1]
    layer, head = int(best["layer"]), int(best["head"])
    chosen = local[(local.layer == layer) & (local["head"] == head)]
    format_looks = looks(local.loc[local.kind == "dithered", "format"])  # of all, so that a format looks alike on both panels
    figure = new_figure(2, PAGE_INCHES, 2.6)
    with rc_context(RC):
        for axes, side in zip(figure.axes, ("keys", "values")):
            some = chosen[chosen.side == side]
            points = some[some.kind == "dithered"]
            curve = some[(some.kind == "bottleneck") & (some.rate_bits <= 1.1 * points.rate_bits.max())]
            axes.plot(curve.rate_bits, curve.relevance_bits, color="black", linewidth=1, label="Gaussian bottleneck")
            _draw_floors(axes, points, some[some.kind == "floor"])
            for number, (fmt, look) in enumerate(format_looks.items()):
                of_format = points[points.format == fmt]
                axes.plot(
                    of_format.rate_bits,
                    of_format.relevance_bits,
                    look.marker,
                    color=look.color,
                    label=fmt,
                    markerfacecolor="none",
                )
                above = (-9, 5)[number % 2]  # where labels lie, in points above the marks
                for _, point in of_format.iterrows():
                    axes.annotate(
                        f"{point.bits:.0f}",
                        (point.rate_bits, point.relevance_bits),
                        xytext=(0, above),
                        textcoords="offset points",
                        ha="center",
                        fontsize=6,
                        color=look.color,
                        path_effects=[withStroke(linewidth=1.5, foreground="white")],
                    )
            axes.set_title(f"layer {layer}, head {head}: {side}")
            axes.set_xlabel("I(X; T), bits per token")
        figure.axes[0].set_ylabel("I(T; Y), bits per token")
        figure.axes[0].legend(frameon=False, loc="lower right")
    return save_figure(figure, local, path)


def _draw_floors(axes: Axes, points: pd.DataFrame, floors: pd.DataFrame) -> None:
    pairs = floors.merge(points, on=["format", "bits"], suffixes=("_floor", ""))
    rates, relevances = (pairs[[f"{name}_floor", name]].to_numpy(float).T for name in ("rate_bits", "relevance_bits"))
    axes.plot(rates, relevances, color="0.8", linewidth=0.6, zorder=0)  # a line for each column
    if len(pairs):
        axes.plot(pairs.rate_bits_floor, pairs.relevance_bits_floor, "+", color="0.4", label="fewest bits at the same error")
