"""Every estimator on every task whose information is known."""

from __future__ import annotations

from collections.abc import Iterable
from math import log
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from ib_analysis.errors import EstimatorError
from ib_analysis.estimators import ESTIMATORS
from ib_analysis.estimators.estimate import Estimator
from ib_analysis.estimators.known_information import KNOWN_TASKS, KnownTask

MAX_ERROR_BITS = 0.1 / log(2)  # a tenth of a nat


def compare(
    samples: int = 10_000,
    estimators: Iterable[Estimator] | None = None,
    tasks: Iterable[KnownTask] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """One row a task and estimator: truth, estimate, error and interval in bits, whether it covers, flags, seconds.

    By default of all estimators on all tasks.
    `refused` says why an estimator declined: entropy of codes where there are none, say. Its numbers are then NaN.
    """
    methods = [*(ESTIMATORS.values() if estimators is None else estimators)]
    pairs = [(task, method) for task in (KNOWN_TASKS.values() if tasks is None else tasks) for method in methods]
    return pd.DataFrame([_row(task, method, samples, seed) for task, method in tqdm(pairs, "estimators")])


def comparison_text(table: pd.DataFrame) -> str:
    """The table of `compare` for a terminal: a block for each task, one line for each estimator. All numbers are in bits."""
    lines = []
    for (task, truth), rows in table.groupby(["task", "truth_bits"], sort=False):
        lines += ["", f"{task}: {truth:.3f} bits"]
        lines.append(f"  {'estimator':<17}{'estimate':>9}{'error':>9}   {'95% interval':<18}{'covers':<8}{'seconds':>7}  flags")
        lines += [_line(row) for _, row in rows.iterrows()]
    return "\n".join(lines[1:])


def trust(table: pd.DataFrame) -> pd.DataFrame:
    """How far flags can be trusted, from the table of `compare`: one row an estimator, and one of all.

    `right` are estimates within 0.1 nats of the truth, `right_flagged` those of them that raise a flag, and `wrong_unflagged`
    estimates that are further off and raise none: no user could know.
    """
    made = table[table["refused"] == ""]
    right, raised = made["error_bits"].abs() <= MAX_ERROR_BITS, made["flags"] != ""
    counts = pd.DataFrame(
        {
            "estimator": made["estimator"],
            "estimates": 1,
            "right": right.astype(int),
            "right_flagged": (right & raised).astype(int),
            "wrong_unflagged": (~right & ~raised).astype(int),
        }
    )
    of_each = counts.groupby("estimator", sort=False).sum().reset_index()
    total = of_each.drop(columns="estimator").sum().to_dict()
    return pd.concat([of_each, pd.DataFrame([{"estimator": "all", **total}])], ignore_index=True)


def _line(row: pd.Series[Any]) -> str:
    if row["refused"]:
        return f"  {row['estimator']:<17}refused: {row['refused']}"
    interval = f"[{row['low_bits']:.3f}, {row['high_bits']:.3f}]"
    return (
        f"  {row['estimator']:<17}{row['bits']:9.3f}{row['error_bits']:+9.3f}   {interval:<18}"
        f"{'yes' if row['covers'] else 'no':<8}{row['seconds']:7.2f}  {row['flags']}"
    )


def _row(task: KnownTask, method: Estimator, samples: int, seed: int) -> dict[str, Any]:
    x, y = task.sample(samples, np.random.default_rng(seed))
    row: dict[str, Any] = {"task": task.name, "estimator": method.name, "truth_bits": task.information_bits}
    start = perf_counter()
    try:
        estimate = method.estimate(x, y)
    except EstimatorError as error:
        return {**row, "refused": str(error)}
    low, high = (float(end) for end in estimate.interval)
    return {
        **row,
        "bits": float(estimate.bits),
        "error_bits": float(estimate.bits) - task.information_bits,
        "low_bits": low,
        "high_bits": high,
        "covers": low <= task.information_bits <= high,
        "flags": ", ".join(estimate.flags),
        "seconds": perf_counter() - start,
        "refused": "",
    }
