"""The demonstration: four budgets on the embedded model, with answers."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from random import Random

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.cache.generation import generate_text
from ib_analysis.experiments.report import SHOWN_SHARE, write_report
from ib_analysis.model.bundled import CARD, measured
from ib_analysis.model.load import load
from ib_analysis.replay.examples import PROMPT_LENGTH
from ib_analysis.scorers import DEFAULT, Scorer
from ib_analysis.search.allocation import Allocation
from ib_analysis.search.optimize import PROMPTS
from ib_analysis.tasks import TASKS
from ib_analysis.tasks.mixture import MIXTURE, mixture

ANSWERED = ("retrieval", "needles", "copying")
SEED = 0
HELD_OUT = 256  # prompts: one in 200 loses bits where most lose thousandths, so that means over fewer differ twofold


def run(
    out: Path,
    question_aware: bool = True,
    *,
    scorer: str | Scorer = DEFAULT,
    tasks: Sequence[str] = MIXTURE,
    calibrating: int = PROMPTS * 3 // 2,
    held_out: int = HELD_OUT,
) -> None:
    """The report of the embedded model, in `out`. Minutes on two cores."""
    model, tokenizer = load()
    print("Embedded model: accuracy and baselines, from its card\n", measured(CARD.read_text(encoding="utf-8")), sep="\n")
    write_report(
        model,
        tokenizer,
        mixture(f"calibration {SEED}", calibrating, PROMPT_LENGTH, tasks),
        mixture("held out", held_out, PROMPT_LENGTH, tasks),
        out,
        name="Embedded model",
        scorer=scorer,
        question_aware=question_aware,
        seed=SEED,
        answers=lambda allocation: _answers(model, tokenizer, allocation),
    )


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, allocation: Allocation) -> list[str]:
    """Answers to three held-out prompts from the full cache and from the compressed one."""
    lines = [f"## Answers at {Fraction(SHOWN_SHARE)} of the memory", ""]
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
    return [*lines, ""]
