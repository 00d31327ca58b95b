"""The demonstration: four budgets on the embedded model, the optimal allocation beside every policy, on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from random import Random

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.cache.generation import generate_text
from ib_analysis.cache.plan import Plans
from ib_analysis.figures.tradeoff import draw_tradeoff
from ib_analysis.files import write_whole
from ib_analysis.model.bundled import CARD, measured
from ib_analysis.model.load import load
from ib_analysis.policies import POLICIES, Cell
from ib_analysis.replay.examples import PROMPT_LENGTH, make_examples
from ib_analysis.replay.measurement import Measurement, Sample, best_plans, sample_plans
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import Scorer, get_scorer
from ib_analysis.search.allocation import Allocation
from ib_analysis.search.optimize import PROMPTS, Workbench, allocate_all, prepare
from ib_analysis.tasks import TASKS
from ib_analysis.tasks.mixture import MIXTURE, mixture

SHARES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
SHOWN_SHARE = 1 / 8  # of which answers, the heatmap and allocation.json are
ANSWERED = ("retrieval", "needles", "copying")
SEED = 0
HELD_OUT = 256  # prompts: one in 200 loses bits where most lose thousandths, so that means over fewer differ twofold


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


def run(
    out: Path,
    question_aware: bool = True,
    *,
    scorer: str | Scorer = "value_aware",
    tasks: Sequence[str] = MIXTURE,
    calibrating: int = PROMPTS * 3 // 2,
    held_out: int = HELD_OUT,
) -> None:
    """Calibrates, allocates, measures, and writes allocation.json, report.md and figures to `out`. Minutes on two cores.

    A killed calibration goes on from where it was; a finished one is used again.
    """
    scorer = get_scorer(scorer)  # an unknown name fails here, not when prompts are there
    model, tokenizer = load()
    print("Embedded model: accuracy and baselines, from its card\n", measured(CARD.read_text()), sep="\n")
    prompts = mixture(f"calibration {SEED}", calibrating, PROMPT_LENGTH, tasks)
    bench = prepare(
        model,
        make_examples(model, tokenizer, prompts, question_aware=question_aware, seed=SEED),
        min(SHARES),
        scorer=scorer,
        question_aware=question_aware,
        seed=SEED,
        profile_path=out / "profile.safetensors",
    )
    allocations = allocate_all(bench, SHARES)
    fresh = mixture("held out", held_out, PROMPT_LENGTH, tasks)
    examples = make_examples(model, tokenizer, fresh, question_aware=question_aware, seed=SEED + 1)
    compared = compare(bench, Replays(model, bench.profile.spec, examples), allocations)
    rows = [row for some in compared for row in some]
    allocations = [replace(allocation, validation=some[0].measurement) for allocation, some in zip(allocations, compared)]
    shown = allocations[SHARES.index(SHOWN_SHARE)]
    report = _report(rows, allocations, _answers(model, tokenizer, shown), question_aware)
    shown.to_json(out / "allocation.json")
    draw_tradeoff(tradeoff_table(rows), out / "tradeoff")
    shown.plot(out / "allocation")
    write_whole(out / "report.md", lambda path: path.write_text(report))
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


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, allocation: Allocation) -> list[str]:
    """Answers to three held-out prompts from the full cache and from the compressed one."""
    lines = []
    for task in ANSWERED:
        prompt = TASKS[task](Random(f"demo {task}"), PROMPT_LENGTH)
        text = prompt.context + prompt.question
        tokens = len(tokenizer(prompt.answer, add_special_tokens=False).input_ids) - 1
        full = generate_text(model, tokenizer, text, tokens)
        cache = allocation.cache(model)
        compressed = generate_text(model, tokenizer, text, tokens, cache)
        full_bytes = cache.get_seq_length() * allocation.spec.shape.bytes_per_token
        lines += [
            f"- **{task}**: `{prompt.question}` expects `{prompt.answer.strip()}`",
            f"  - full cache, {full_bytes:,} bytes at 16 bits: `{full.strip()}`",
            f"  - compressed cache, {cache.nbytes:,} bytes: `{compressed.strip()}`",
        ]
    return lines


def _report(rows: list[Row], allocations: list[Allocation], answers: list[str], question_aware: bool) -> str:
    lines = [
        "# Where to spend a KV cache's memory",
        "",
        f"Embedded model, {rows[0].measurement.prompts} held-out prompts of about {PROMPT_LENGTH} tokens, "
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
    title = f"## Answers at {Fraction(SHOWN_SHARE)} of the memory"
    return "\n".join([*lines, "", title, "", *answers, "", "![trade-off](tradeoff.png)", "", "![heads](allocation.png)", ""])


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
