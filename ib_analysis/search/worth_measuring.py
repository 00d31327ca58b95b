"""Measurement of the options whose losses, as far as they are known, could change the choice, until knowing them gains little."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ib_analysis.cache.spec import ByteLimit
from ib_analysis.errors import CalibrationError
from ib_analysis.replay.replays import Replays
from ib_analysis.search.profile import Profile

DRAWS = 8  # of what losses may be, in a round
GAIN = 0.01  # of the loss: what knowing all losses must promise, for more to be measured
SOLVER_GAP = 0.005
FIRST_PROMPTS = 16  # of an option; what still matters then is measured on all
MAX_OPTIONS = 64  # of a round: those that are worth most
MAX_ROUNDS = 200

Options = set[tuple[int, int]]  # (head, option)


def measure_worthwhile(profile: Profile, replays: Replays, limits: Sequence[ByteLimit], path: Path | None = None) -> None:
    """Measures options that are chosen if losses turn out as they may, by draws from the law of prices.

    A limit is done when the choices by the draws lose, by the draw, hardly less than the choice by what is expected (the expected
    value of perfect information), or when all that these choose is measured on all prompts.
    Raises CalibrationError if this takes more than 200 rounds.
    """
    unsettled = list(limits)
    with tqdm(desc="measuring heads", leave=False) as progress:
        for _ in range(MAX_ROUNDS):
            worth = [_worth_measuring(profile, limit) for limit in unsettled]
            unsettled = [limit for limit, some in zip(unsettled, worth) if some]
            if not unsettled:
                return
            wanted = sum(worth, Counter()).most_common(MAX_OPTIONS)
            measure_options(profile, replays, {option for option, _ in wanted})
            progress.update(len(wanted))
            if path is not None:
                profile.save(path)
    raise CalibrationError(f"the chosen options did not settle in {MAX_ROUNDS} rounds: pass more prompts")


def _worth_measuring(profile: Profile, limit: ByteLimit) -> Counter[tuple[int, int]]:
    """What knowing the loss of each (head, option) may be worth: how often it is chosen, times how uncertain it is, in bits.

    Nothing if knowing them all could gain little.
    """
    law, heads = profile.law, np.arange(len(profile.loss_bits))
    generator = np.random.default_rng(int(profile.measured_prompts.sum()))  # the same where a killed search goes on
    drawn = [law.draw(generator) for _ in range(DRAWS)]
    best = profile.solve(limit, law.expected, gap=SOLVER_GAP)
    others = [profile.solve(limit, losses, gap=SOLVER_GAP) for losses in drawn]
    gain = np.mean([losses[heads, best.choice].sum() - other.loss for losses, other in zip(drawn, others)])
    worth: Counter[tuple[int, int]] = Counter()
    if gain > GAIN * best.loss:
        error_bits = np.std(drawn, axis=0)  # [U, O]
        error_bits[profile.measured_prompts == profile.prompts] = 0.0
        for choice in (best.choice, *(other.choice for other in others)):
            for head, option in enumerate(choice.tolist()):
                if error_bits[head, option] > 0:
                    worth[head, option] += error_bits[head, option]
    return worth


def measure_options(profile: Profile, replays: Replays, options: Options) -> None:
    """Measures each option of a head, all other heads left as they are: on a few prompts at first, the second time on all."""
    heads = profile.spec.shape.heads
    again = sorted(pair for pair in options if profile.measured_prompts[pair])
    for some, numbers in ((sorted(options.difference(again)), spread(len(replays), FIRST_PROMPTS)), (again, range(len(replays)))):
        if some:
            tried = [profile.spec.single_head(heads[head], profile.options[option]) for head, option in some]
            kl_bits, _ = replays.measure(tried, numbers=numbers)
            for (head, option), losses_bits in zip(some, kl_bits.T):
                profile.record(head, option, losses_bits)


def spread(count: int, few: int) -> list[int]:
    """A few of so many prompts, evenly spread; all if there are no more."""
    return np.unique(np.linspace(0, count - 1, few).round().astype(int)).tolist()
