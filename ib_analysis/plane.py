"""The information plane of a cache: what it retains about the next tokens, against what it takes to store."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.allocation import Allocation
from ib_analysis.calibration import Replays, null_plans
from ib_analysis.errors import CalibrationError
from ib_analysis.figures.plane import plot_local_plane, plot_plane
from ib_analysis.figures.style import save_figure
from ib_analysis.held_out import check_shares, split_episodes
from ib_analysis.local_plane import COLUMNS, local_plane
from ib_analysis.measurement import Sample, bootstrap_interval
from ib_analysis.optimize import Prompts, allocate_all, check_name, episodes_for, prepare
from ib_analysis.pieces import gather
from ib_analysis.plan import Plans
from ib_analysis.policies import POLICIES
from ib_analysis.rates import CodeRates, Rate, all_pieces, context_lengths
from ib_analysis.scorers import SCORERS

SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
PROMPTS = 96
HELD_OUT_EVERY = 4


@dataclass(frozen=True, eq=False)
class Plane:
    """Measured points of compressed caches, and the local planes of their heads.

    `points` has a row for each cache: family ("optimal", "quantized pruning", "prune-only", "quantize-only", "null point", "full
    point"), budget_share, token_share, format, key_bits and value_bits of a uniform cell, and
        stored_bits, code_rate_bits, tight_code_rate_bits: rates in bits per context token (`ib_analysis.rates.Rate`);
        information_bits, ceiling_low_bits, ceiling_high_bits: the ceiling, usable information of the full cache about the next
            token in bits per predicted token, E KL(p || p_null), with its 95% interval over held-out prompts. It equals
            I(X; Y | C) only if p_null, the model with every compressible token evicted, is calibrated; else it is more;
        retained_bits, low_bits, high_bits: what is left of it, the ceiling less E KL(p || r). The interval is that of the
            share retained, times the ceiling as measured;
        chord_bits: what random eviction retains at the same stored_bits: with probability p the full cache, else nothing;
        best: of its family's cells at this budget the one that retains most, on these very prompts.
    `local`: see `local_plane`; empty if the held-out prompts have too few tokens for it.
    """

    points: pd.DataFrame
    local: pd.DataFrame
    allocations: tuple[Allocation, ...]

    def __str__(self) -> str:
        rates = dict.fromkeys(("stored_bits", "code_rate_bits", "key_bits", "value_bits"), "{:.0f}".format)
        bits = dict.fromkeys(("retained_bits", "low_bits", "high_bits", "chord_bits"), "{:.3f}".format)
        shares = dict.fromkeys(("budget_share", "token_share"), "{:.4g}".format)
        columns = [
            "family",
            "budget_share",
            "token_share",
            "format",
            "key_bits",
            "value_bits",
            "stored_bits",
            "code_rate_bits",
            *bits,
        ]
        shown = self.points.loc[self.points.best, columns].fillna({"format": ""})
        return shown.to_string(index=False, na_rep="", formatters={**rates, **bits, **shares})

    def plot(self, path: str | Path | None = None) -> Figure:
        """Retained information against both rates; with `path` also written there as PDF, PNG and CSV."""
        return _drawn(plot_plane(self.points), self.points, path)

    def plot_local(self, path: str | Path | None = None) -> Figure:
        """Dithered formats under the Gaussian bottleneck, for the head whose tokens tell most; `path` as in `plot`."""
        return _drawn(plot_local_plane(self.local), self.local, path)


def information_plane(
    model: PreTrainedModel,
    *,
    prompts: Prompts | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scorer: str = "value_aware",
    question_aware: bool = True,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    profile_path: str | Path | None = None,
) -> Plane:
    """The plane of a model's cache, from one calibration for all budgets `shares`.

    A quarter of the prompts (by default 96 of the package's own) is held out: points are measured on it. The other arguments
    are those of `optimal_allocation`. Raises what that does, before calibration if prompts are fewer than 4 or too short.
    """
    check_name("scorer", scorer, SCORERS)
    check_shares(shares)
    episodes = episodes_for(model, prompts, tokenizer, question_aware, seed, PROMPTS)
    chosen, rest = split_episodes(episodes, HELD_OUT_EVERY, min(shares))
    bench = prepare(
        model, chosen, min(shares), scorer=scorer, question_aware=question_aware, seed=seed, profile_path=profile_path
    )
    allocations = allocate_all(bench, shares)
    profile = bench.profile
    held_out = Replays(model, profile.shape, profile.pinned, scorer, rest)
    points = measure_points(held_out, allocations)
    try:
        local = local_plane(held_out)
    except CalibrationError as error:  # the points are worth keeping
        warnings.warn(f"Plane.local is empty: {error}", stacklevel=2)
        local = pd.DataFrame(columns=COLUMNS)
    return Plane(points, local, tuple(allocations))


def measure_points(held_out: Replays, allocations: Sequence[Allocation]) -> pd.DataFrame:
    """`Plane.points` of allocations of one profile, with the uniform cells of their budgets."""
    shape, pinned = allocations[0].shape, allocations[0].pinned
    cells = [cell for allocation in allocations for cell in _cells(allocation)]
    ends: list[tuple[dict[str, Any], Plans]] = [
        ({"family": "null point", "budget_share": 0.0, "token_share": 0.0}, null_plans(shape)),
        ({"family": "full point", "budget_share": 1.0, "token_share": 1.0}, (None,) * len(shape.layers)),
    ]
    described = [*cells, *ends]
    plans = [plan for _, plan in described]
    pieces = all_pieces(plans, shape)
    rates = CodeRates(shape, pinned, context_lengths(held_out), pieces, gather(held_out, pieces, groups=0, show="code rates"))
    kl_bits, accuracy = held_out.measure(plans, show="held-out prompts")  # [episodes, plans]
    null = len(plans) - 2
    sample = Sample(kl_bits, accuracy, kl_bits[:, null], accuracy[:, -1])
    information_bits = float(kl_bits[:, null].mean())  # what evicting everything loses
    ceiling = {"information_bits": information_bits} | _interval("ceiling_", bootstrap_interval(kl_bits[:, null]))
    rows = []
    for i, (row, plan) in enumerate(described):
        lost, least, most = sample.ratio_interval(i, null)  # shares of the ceiling
        retained = {"retained_bits": information_bits * (1 - lost)}
        retained |= _interval("", (information_bits * (1 - most), information_bits * (1 - least)))
        rows.append({**row, **_rate_columns(rates.total(plan)), **retained, **ceiling})
    return _with_chord_and_best(pd.DataFrame(rows))


def chord(points: pd.DataFrame, rate: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Its ends, (rate, retained bits) of the null and of the full cache, at a column of rates.

    A coin that keeps the full cache with probability p, and else nothing, scales both by p: the straight line between.
    """
    null, full = (points[points.family == family].iloc[0] for family in ("null point", "full point"))
    return (float(null[rate]), float(null.retained_bits)), (float(full[rate]), float(full.retained_bits))


def _cells(allocation: Allocation) -> list[tuple[dict[str, Any], Plans]]:
    """The allocation and every uniform cell of its budget, each with what a row says of it."""
    shape, pinned, length = allocation.shape, allocation.pinned, allocation.context_length
    described: list[tuple[dict[str, Any], Plans]] = [({"family": "optimal"}, allocation.plans)]
    for policy in (POLICIES["prune_only"], POLICIES["uniform"]):
        for cell in policy(shape, pinned, length, allocation.budget_share):
            plan = next(row[0] for row in cell if row)
            tier = plan.tiers[0]
            raw = tier.key_bits == tier.value_bits == 16
            family = "prune-only" if raw else "quantize-only" if tier.share == 1 else "quantized pruning"
            if raw and policy is POLICIES["uniform"]:
                continue  # the grid's own 16-bit cell
            bits = {"token_share": tier.share, "format": plan.format, "key_bits": tier.key_bits, "value_bits": tier.value_bits}
            described.append(({"family": family} | bits, cell))
    return [({"budget_share": allocation.budget_share} | row, plan) for row, plan in described]


def _interval(name: str, ends: tuple[float, float]) -> dict[str, float]:
    return {f"{name}low_bits": ends[0], f"{name}high_bits": ends[1]}


def _rate_columns(rate: Rate) -> dict[str, float]:
    return {"stored_bits": rate.stored_bits, "code_rate_bits": rate.code_bits, "tight_code_rate_bits": rate.tight_bits}


def _with_chord_and_best(points: pd.DataFrame) -> pd.DataFrame:
    (null_rate, _), (full_rate, information) = chord(points, "stored_bits")
    kept = (points.stored_bits - null_rate) / (full_rate - null_rate)  # the coin's p
    best = points.groupby(["family", "budget_share"]).retained_bits.transform("max") == points.retained_bits
    columns = ["family", "budget_share", "token_share", "format", "key_bits", "value_bits"]
    rest = [name for name in points.columns if name not in columns]
    return points.reindex(columns=[*columns, *rest]).assign(chord_bits=np.asarray(kept) * information, best=best)


def _drawn(figure: Figure, table: pd.DataFrame, path: str | Path | None) -> Figure:
    if path is not None:
        save_figure(figure, table, Path(path))
    return figure
