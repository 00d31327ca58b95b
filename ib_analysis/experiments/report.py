"""A model's budgets: at each the optimal allocation beside every policy, on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.cache.plan import Plans
from ib_analysis.figures.tradeoff import draw_tradeoff
from ib_analysis.files import write_whole
from ib_analysis.policies import POLICIES, Cell
from ib_analysis.replay.examples import Prompts, make_examples
from ib_analysis.replay.measurement import Measurement, Sample, best_plans, sample_plans
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import Scorer, get_scorer
from ib_analysis.search.allocation import Allocation
from ib_analysis.search.optimize import Workbench, allocate_all, prepare

SHARES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
SHOWN_SHARE = 1 / 8  # of which the heatmap and allocation.json are


@dataclass(frozen=True)
class Row:
    """One policy at one budget, measured on held-out prompts."""

    share: float
    policy: str
    setting: str
    nbytes: int
    bits_per_token: float
    measurement: Measurement
    ratio: tuple[float, float, float]  # KL over that of the best uniform cell, with its 95% interval


def write_report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibrating: Prompts,
    fresh: Prompts,
    out: Path,
    *,
    name: str,
    scorer: str | Scorer,
    question_aware: bool,
    seed: int,
    answers: Callable[[Allocation], list[str]] | None = None,
) -> None:
    """Calibrates, allocates, measures on fresh prompts, and writes allocation.json, report.md and figures to `out`.

    `name` is the model's in the report, `answers` adds lines to it. A killed calibration goes on from where it was; a finished
    one is used again.
    """
    scorer = get_scorer(scorer)  # an unknown name fails here, not when prompts are there
    bench = prepare(
        model,
        make_examples(model, tokenizer, calibrating, question_aware=question_aware, seed=seed),
        min(SHARES),
        scorer=scorer,
        question_aware=question_aware,
        seed=seed,
        profile_path=out / "profile.safetensors",
    )
    allocations = allocate_all(bench, SHARES)
    examples = make_examples(model, tokenizer, fresh, question_aware=question_aware, seed=seed + 1)
    compared = compare(bench, Replays(model, bench.profile.spec, examples), allocations)
    rows = [row for some in compared for row in some]
    allocations = [replace(allocation, validation=some[0].measurement) for allocation, some in zip(allocations, compared)]
    shown = allocations[SHARES.index(SHOWN_SHARE)]
    report = _report(name, rows, allocations, [] if answers is None else answers(shown), question_aware)
    shown.to_json(out / "allocation.json")
    draw_tradeoff(tradeoff_table(rows), out / "tradeoff")
    shown.plot(out / "allocation")
    write_whole(out / "report.md", lambda path: path.write_text(report, encoding="utf-8"))
    print(report)
    print(f"written to {out}/")


def compare(bench: Workbench, held_out: Replays, allocations: list[Allocation]) -> list[list[Row]]:
    """Every allocation, and of each policy the cell that is best on the held-out prompts themselves."""
    spec = bench.profile.spec
    contenders = [{"optimal": Cell(allocation.plans, "optimal", allocation.source)} for allocation in allocations]
    grids: dict[tuple[int, str], list[Cell]] = {}
    for number, allocation in enumerate(allocations):
        for name, policy in POLICIES.items():
            if cells := list(policy(spec, allocation.limit)):
                grids[number, name] = cells
    best = best_plans(held_out, [[cell.plans for cell in cells] for cells in grids.values()], "held-out prompts")
    for ((number, name), cells), index in zip(grids.items(), best):
        contenders[number][name] = cells[index]
    different = list(dict.fromkeys(cell.plans for some in contenders for cell in some.values()))
    sample = sample_plans(held_out, different, "held-out prompts")
    return [
        [_row(allocation, sample, different, name, some) for name in some] for allocation, some in zip(allocations, contenders)
    ]


def _row(allocation: Allocation, sample: Sample, sampled: list[Plans], policy: str, contenders: dict[str, Cell]) -> Row:
    cell, length = contenders[policy], allocation.context_length
    nbytes = int(allocation.spec.nbytes(cell.plans, length))
    index, uniform = sampled.index(cell.plans), sampled.index(contenders["uniform"].plans)
    return Row(
        share=allocation.budget_share,
        policy=policy,
        setting=cell.setting,
        nbytes=nbytes,
        bits_per_token=8 * nbytes / length,
        measurement=sample.measurement(index),
        ratio=sample.ratio_interval(index, uniform),
    )


def tradeoff_table(rows: list[Row]) -> pd.DataFrame:
    """What `draw_tradeoff` draws."""
    content = []
    for row in rows:
        low, high = row.measurement.loss_interval_bits
        information = row.measurement.information_bits
        retained = (information - row.measurement.loss_bits, information - high, information - low, information)
        content.append((row.policy, row.share, row.bits_per_token, *retained))
    columns = ["policy", "share", "bits_per_token", "retained_bits", "low_bits", "high_bits", "information_bits"]
    return pd.DataFrame(content, columns=columns)


def _report(name: str, rows: list[Row], allocations: list[Allocation], answers: list[str], question_aware: bool) -> str:
    measured = rows[0].measurement
    shortest, longest = measured.lengths or (0, 0)
    lines = [
        "# Where to spend a KV cache's memory",
        "",
        f"{name}, {measured.prompts} held-out prompts whose cache holds {shortest} to {longest} tokens when it is compressed, "
        f"{'the scorer sees the first question' if question_aware else 'the scorer does not see the question'}. "
        "Every byte counts: codes, scales, sinks, window. KL is between the full and the compressed cache's predictions, in "
        "bits per predicted token; retained is the information of the full cache less the KL; intervals are 95% "
        "bootstraps over prompts. Of each policy it is the cell that is best on these very prompts.",
        "",
        "| budget | policy | setting | bytes | retained | KL | KL / best uniform | accuracy (full) |",
        "|---|---|---|---:|---:|---:|---:|---:|",
        *map(_line, rows),
        "",
        "| budget | heads alone, summed | together, in-sample | held-out | held-out ratio | solver gap | minimum context |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for allocation in allocations:
        assert allocation.validation is not None
        lines.append(
            f"| {Fraction(allocation.budget_share)} | {allocation.loss_sum_bits:.4f} | {allocation.in_sample_loss_bits:.4f} | "
            f"{allocation.validation.loss_bits:.4f} | {allocation.held_out_ratio:.2f} | {allocation.solver_gap:.1e} | "
            f"{allocation.minimum_context} tokens |"
        )
    return "\n".join([*lines, "", *answers, "![trade-off](tradeoff.png)", "", "![heads](allocation.png)", ""])


def _line(row: Row) -> str:
    found = row.measurement
    low, high = found.loss_interval_bits
    accuracy = "" if found.accuracy is None else f"{found.accuracy:.3f} ({found.full_accuracy:.3f})"
    ratio, ratio_low, ratio_high = row.ratio
    return (
        f"| {Fraction(row.share)} | {row.policy} | {row.setting} | {row.nbytes:,} | {found.retained_bits:.3f} "
        f"({found.retained_share:.1%}) | {found.loss_bits:.4f} [{low:.4f}, {high:.4f}] | "
        f"{ratio:.2f} [{ratio_low:.2f}, {ratio_high:.2f}] | {accuracy} |"
    )
