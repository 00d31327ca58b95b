"""What it costs to drive the optimizer by an information that is not the model's loss: measured KL on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.experiments.setup import set_up
from ib_analysis.replay.examples import Prompts
from ib_analysis.replay.measurement import sample_plans
from ib_analysis.scorers import DEFAULT, Scorer
from ib_analysis.search.objectives import OBJECTIVES, USABLE
from ib_analysis.search.optimize import allocate, allocate_all

SHARES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
PROMPTS = 192
HELD_OUT_EVERY = 2


def objective_costs(
    model: PreTrainedModel,
    *,
    prompts: Prompts | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scorer: str | Scorer = DEFAULT,
    question_aware: bool = True,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    profile_path: str | Path | None = None,
) -> pd.DataFrame:
    """One row for each budget and objective, from one calibration; half of the prompts is held out and measured.

    The model is left as it was.

    Columns: budget_share, objective, nbytes; kl_bits = E KL(full || compressed) in bits per predicted token with its 95%
    interval low_bits, high_bits; ratio, ratio_low, ratio_high: that KL over that of "usable", a paired bootstrap;
    retained_share of the full cache's information; accuracy of known answers.
    The other arguments are those of `optimal_allocation`. Raises what that does, before calibration if prompts are fewer
    than 5 or too short.
    """
    bench, held_out = set_up(
        model, prompts, tokenizer, scorer, question_aware, shares, seed, profile_path, count=PROMPTS, every=HELD_OUT_EVERY
    )
    profile = bench.profile
    rows = []
    for share, usable in zip(shares, allocate_all(bench, shares)):
        plans = {USABLE: usable.plans}
        plans |= {objective: allocate(bench, share, objective).plans for objective in OBJECTIVES}
        sample = sample_plans(held_out, list(plans.values()), show=f"held-out prompts at {share:.4g}")
        for i, (objective, chosen) in enumerate(plans.items()):
            measured = sample.measurement(i)
            ratio, ratio_low, ratio_high = sample.ratio_interval(i, 0)
            rows.append(
                {
                    "budget_share": share,
                    "objective": objective,
                    "nbytes": int(profile.spec.nbytes(chosen, profile.context_length)),
                    "kl_bits": measured.loss_bits,
                    "low_bits": measured.loss_interval_bits[0],
                    "high_bits": measured.loss_interval_bits[1],
                    "ratio": ratio,
                    "ratio_low": ratio_low,
                    "ratio_high": ratio_high,
                    "retained_share": measured.retained_share,
                    "accuracy": measured.accuracy,
                }
            )
    return pd.DataFrame(rows)


def costs_text(costs: pd.DataFrame) -> str:
    """`objective_costs` as a Markdown table."""
    lines = ["| budget | objective | KL | KL / usable | retained | accuracy |", "|---|---|---:|---:|---:|---:|"]
    for row in costs.to_dict("records"):
        accuracy = "" if pd.isna(row["accuracy"]) else f"{row['accuracy']:.3f}"
        lines.append(
            f"| {row['budget_share']:.4g} | {row['objective']} | "
            f"{row['kl_bits']:.4f} [{row['low_bits']:.4f}, {row['high_bits']:.4f}] | "
            f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}] | {row['retained_share']:.1%} | {accuracy} |"
        )
    return "\n".join(lines)
