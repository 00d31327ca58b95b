"""What pruning loses under each scorer, against stored bits."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from ib_analysis.figures.style import COLUMN_INCHES, RC, draw_losses, looks, new_figure, save_figure


def draw_scorers(table: pd.DataFrame, path: str | Path | None = None) -> Figure:
    """Columns policy, scorer, bits_per_token (stored, metadata included), kl_bits, low_bits, high_bits; one axes a policy.

    With `path` also written there.
    """
    policies = list(dict.fromkeys(table.policy))
    figure = new_figure(len(policies), COLUMN_INCHES * len(policies), 3.0)
    with rc_context(RC):
        for axes, policy in zip(figure.axes, policies):
            draw_losses(axes, table[table.policy == policy], "bits_per_token", looks(table.scorer), "scorer")
            axes.set_xscale("log", base=2)
            axes.set_xlabel("stored bits per context token")
            axes.set_title(policy)
        figure.axes[0].set_ylabel("loss (bits per predicted token)")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return save_figure(figure, table, path)
