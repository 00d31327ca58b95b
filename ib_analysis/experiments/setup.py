"""What experiments share: checks before anything is calibrated, a calibration, and prompts that are held out of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.cache.plan import Recent
from ib_analysis.errors import BudgetError, CalibrationError
from ib_analysis.replay.examples import Example, Prompts, check_lengths, examples_for, median_length
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import Scorer, get_scorer
from ib_analysis.search.budget import Budget
from ib_analysis.search.optimize import Workbench, prepare

MIN_CALIBRATING = 3  # of which one decides


def set_up(
    model: PreTrainedModel,
    prompts: Prompts | None,
    tokenizer: PreTrainedTokenizerBase | None,
    scorer: str | Scorer,
    question_aware: bool,
    shares: Sequence[float],
    seed: int,
    profile_path: str | Path | None,
    *,
    count: int,
    every: int,
) -> tuple[Workbench, Replays]:
    """A calibration for budgets `shares`, and the prompts held out: one in `every`, by default of `count` of our own."""
    scorer = get_scorer(scorer)
    check_shares(shares)
    examples = examples_for(model, prompts, tokenizer, question_aware, seed, count)
    calibrating, rest = split_examples(examples, every, min(shares))
    bench = prepare(
        model, calibrating, min(shares), scorer=scorer, question_aware=question_aware, seed=seed, profile_path=profile_path
    )
    return bench, Replays(model, bench.profile.spec, rest)


def check_shares(shares: Sequence[float]) -> None:
    """Raises BudgetError unless there are budgets, all of them shares of the full cache in (0, 1)."""
    if len(shares) == 0:
        raise BudgetError("no budgets: pass at least one share of the full cache, as shares=(1/4, 1/8)")
    if any(Budget.share(share).amount == 1 for share in shares):
        raise BudgetError("a share of 1 is the full cache, which is measured in any case: pass shares below 1")


def split_examples(examples: Sequence[Example], every: int, smallest_share: float) -> tuple[list[Example], list[Example]]:
    """(to calibrate on, held out: one in `every`). Raises CalibrationError if either are too few, or one is too short."""
    held_out = list(examples[every - 1 :: every])
    calibrating = [example for i, example in enumerate(examples) if i % every != every - 1]
    if len(calibrating) < MIN_CALIBRATING or not held_out:
        needed = max(every, MIN_CALIBRATING + (MIN_CALIBRATING - 1) // (every - 1))
        raise CalibrationError(
            f"{len(examples)} prompts are too few, as one in {every} is held out: pass at least {needed}, better 96 or more"
        )
    check_lengths(examples, Recent.within(smallest_share, median_length(calibrating)))
    return calibrating, held_out
