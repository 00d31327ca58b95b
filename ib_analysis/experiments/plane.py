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

from ib_analysis.cache.plan import Plans
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.codes.bottleneck import COLUMNS, local_plane
from ib_analysis.codes.gathered import all_sides, gather
from ib_analysis.codes.rates import CodeRates, Rate
from ib_analysis.errors import CalibrationError
from ib_analysis.experiments.setup import set_up
from ib_analysis.figures.plane import draw_local_plane, draw_plane
from ib_analysis.policies import POLICIES
from ib_analysis.replay.examples import Prompts
from ib_analysis.replay.measurement import Sample, bootstrap_interval
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import DEFAULT, Scorer
from ib_analysis.search.allocation import Allocation
from ib_analysis.search.optimize import allocate_all

SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
PROMPTS = 96
HELD_OUT_EVERY = 4


@dataclass(frozen=True, eq=False)
class Plane:
    """Measured points of compressed caches, and the local planes of their heads.

    `points` has a row for each cache: family ("optimal", "null point", "full point", or that of a policy's cell), setting in
    words, budget_share; token_share, key_bits and value_bits, means over heads and, of the bits, over what is kept; and
        stored_bits, code_rate_bits, tight_code_rate_bits: rates in bits per context token (`ib_analysis.codes.rates.Rate`);
        information_bits, ceiling_low_bits, ceiling_high_bits: the ceiling, usable information of the full cache about the next
            token in bits per predicted token, E KL(p || p_null), with its 95% interval over held-out prompts. It equals
            I(X; Y | C) only if p_null, the model with every compressible token evicted, is calibrated; else it is more;
        retained_bits, low_bits, high_bits: what is left of it, the ceiling less E KL(p || r). The interval is that of the
            share retained, times the ceiling as measured;
        time_sharing_bits: what random eviction retains at the same stored_bits: the full cache with probability p, else nothing;
        best: of its family's cells at this budget the one that retains most, on these very prompts.
    `local`: see `local_plane`; empty if the held-out prompts have too few tokens for it.
    """

    points: pd.DataFrame
    local: pd.DataFrame
    allocations: tuple[Allocation, ...]

    def __str__(self) -> str:
        rates = dict.fromkeys(("stored_bits", "code_rate_bits"), "{:.0f}".format)
        bits = dict.fromkeys(("retained_bits", "low_bits", "high_bits", "time_sharing_bits"), "{:.3f}".format)
        shares = {"budget_share": "{:.4g}".format}
        columns = ["family", "setting", "budget_share", "stored_bits", "code_rate_bits", *bits]
        shown = self.points.loc[self.points.best, columns]
        told = shown.to_string(index=False, formatters={**rates, **bits, **shares})
        if self.local.empty:
            return told
        gaps = self.local.pivot_table("gap_bits", ["side", "format"], "bits").to_string(float_format="{:.2f}".format)
        return f"{told}\n\nBits per channel above the Gaussian bottleneck, means over heads:\n{gaps}"

    def plot(self, path: str | Path | None = None) -> Figure:
        """Retained information against both rates; with `path` also written there as PDF, PNG and CSV."""
        return draw_plane(self.points, path)

    def plot_local(self, path: str | Path | None = None) -> Figure:
        """Dithered formats under the Gaussian bottleneck, for the head whose tokens tell most; `path` as in `plot`."""
        return draw_local_plane(self.local, path)


def information_plane(
    model: PreTrainedModel,
    *,
    prompts: Prompts | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scorer: str | Scorer = DEFAULT,
    question_aware: bool = True,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    profile_path: str | Path | None = None,
) -> Plane:
    """The plane of a model's cache, from one calibration for all budgets `shares`. The model is left as it was.

    A quarter of the prompts (by default 96 of the package's own) is held out: points are measured on it. The other arguments
    are those of `optimal_allocation`. Raises what that does, before calibration if prompts are fewer than 4 or too short.
    """
    bench, held_out = set_up(
        model, prompts, tokenizer, scorer, question_aware, shares, seed, profile_path, count=PROMPTS, every=HELD_OUT_EVERY
    )
    allocations = allocate_all(bench, shares)
    points = measure_points(held_out, allocations)
    try:
        local = local_plane(held_out)
    except CalibrationError as error:  # the points are worth keeping
        warnings.warn(f"Plane.local is empty: {error}", stacklevel=2)
        local = pd.DataFrame(columns=COLUMNS)
    return Plane(points, local, tuple(allocations))


def measure_points(held_out: Replays, allocations: Sequence[Allocation]) -> pd.DataFrame:
    """`Plane.points` of allocations of one profile, with the cells of all policies at their budgets."""
    spec = held_out.spec
    described = [
        *(cell for allocation in allocations for cell in _cells(allocation, spec)),
        ({"family": "null point", "setting": "all evicted", "budget_share": 0.0}, spec.null_plans),
        ({"family": "full point", "setting": "nothing compressed", "budget_share": 1.0}, spec.full_plans),
    ]
    plans = [plan for _, plan in described]
    sides = all_sides(plans, spec.shape)
    rates = CodeRates(spec, held_out.lengths, sides, gather(held_out, sides, groups=0, show="code rates"))
    kl_bits, accuracy = held_out.measure(plans, show="held-out prompts")  # [examples, plans]
    null = len(plans) - 2
    sample = Sample(kl_bits, accuracy, kl_bits[:, null], accuracy[:, -1], held_out.lengths)
    information_bits = float(kl_bits[:, null].mean())  # what evicting everything loses
    ceiling = {"information_bits": information_bits} | _interval("ceiling_", bootstrap_interval(kl_bits[:, null]))
    rows = []
    for i, (row, plan) in enumerate(described):
        lost, least, most = sample.ratio_interval(i, null)  # shares of the ceiling
        retained = {"retained_bits": information_bits * (1 - lost)}
        retained |= _interval("", (information_bits * (1 - most), information_bits * (1 - least)))
        rows.append({**row, **spec.mean_tier(plan), **_rate_columns(rates.total(plan)), **retained, **ceiling})
    return _with_time_sharing_and_best(pd.DataFrame(rows))


def time_sharing(points: pd.DataFrame, rate: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Its ends, (rate, retained bits) of the null and of the full cache, at a column of rates.

    A coin that keeps the full cache with probability p, and else nothing, scales both by p: the straight line between.
    """
    null, full = (points[points.family == family].iloc[0] for family in ("null point", "full point"))
    return (float(null[rate]), float(null.retained_bits)), (float(full[rate]), float(full.retained_bits))


def _cells(allocation: Allocation, spec: CacheSpec) -> list[tuple[dict[str, Any], Plans]]:
    """The allocation and every policy's cells at its budget, each with what a row says of it."""
    described: dict[Plans, dict[str, Any]] = {}  # a cell that two policies have is the first one's
    for policy in POLICIES.values():
        for cell in policy(spec, allocation.limit):
            described.setdefault(cell.plans, {"family": cell.family, "setting": cell.setting})
    rows = [(allocation.plans, {"family": "optimal", "setting": allocation.source}), *described.items()]
    return [({"budget_share": allocation.budget_share} | row, plans) for plans, row in rows]


def _interval(name: str, ends: tuple[float, float]) -> dict[str, float]:
    return {f"{name}low_bits": ends[0], f"{name}high_bits": ends[1]}


def _rate_columns(rate: Rate) -> dict[str, float]:
    return {"stored_bits": rate.stored_bits, "code_rate_bits": rate.code_bits, "tight_code_rate_bits": rate.tight_bits}


def _with_time_sharing_and_best(points: pd.DataFrame) -> pd.DataFrame:
    (null_rate, _), (full_rate, information) = time_sharing(points, "stored_bits")
    kept = (points.stored_bits - null_rate) / (full_rate - null_rate)  # the coin's p
    best = points.groupby(["family", "budget_share"]).retained_bits.transform("max") == points.retained_bits
    columns = ["family", "setting", "budget_share", "token_share", "key_bits", "value_bits"]
    rest = [name for name in points.columns if name not in columns]
    return points.reindex(columns=[*columns, *rest]).assign(time_sharing_bits=np.asarray(kept) * information, best=best)
