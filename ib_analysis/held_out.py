"""Checks of an experiment before anything is calibrated, and the prompts that it holds out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ib_analysis.budget import Budget
from ib_analysis.calibration import pinned_for
from ib_analysis.episodes import Episode
from ib_analysis.errors import BudgetError, CalibrationError
from ib_analysis.optimize import check_lengths

FEWEST_CALIBRATING = 3  # of which one decides


def check_shares(shares: Sequence[float]) -> None:
    """Raises BudgetError unless there are budgets, all of them shares of the full cache in (0, 1)."""
    if len(shares) == 0:
        raise BudgetError("no budgets: pass at least one share of the full cache, as shares=(1/4, 1/8)")
    if any(Budget.share(share).amount == 1 for share in shares):
        raise BudgetError("a share of 1 is the full cache, which is measured in any case: pass shares below 1")


def split_episodes(episodes: Sequence[Episode], every: int, smallest_share: float) -> tuple[list[Episode], list[Episode]]:
    """(to calibrate on, held out: one in `every`). Raises CalibrationError if either are too few, or one is too short."""
    held_out = list(episodes[every - 1 :: every])
    calibrating = [episode for i, episode in enumerate(episodes) if i % every != every - 1]
    if len(calibrating) < FEWEST_CALIBRATING or not held_out:
        needed = max(every, FEWEST_CALIBRATING + (FEWEST_CALIBRATING - 1) // (every - 1))
        raise CalibrationError(
            f"{len(episodes)} prompts are too few, as one in {every} is held out: pass at least {needed}, better 96 or more"
        )
    check_lengths(episodes, pinned_for(smallest_share, int(np.median([len(episode.prefill) for episode in calibrating]))))
    return calibrating, held_out
