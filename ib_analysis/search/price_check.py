"""Whether prices hold: a sample of them beside what measurement says on the same prompts."""

from __future__ import annotations

from math import nan

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from ib_analysis.replay.replays import Replays
from ib_analysis.search.profile import PriceCheck, Profile
from ib_analysis.search.worth_measuring import spread

PROMPTS = 8
HEADS = 24  # half of them those of the highest prices, which carry the loss
RESAMPLES = 2000


def check_prices(profile: Profile, replays: Replays, choice: NDArray[np.int64]) -> PriceCheck:
    """Measures a sample of heads under their chosen options [U]: half of the highest prices, half spread over the rest."""
    heads = _sample(profile.price_bits[np.arange(len(choice)), choice])
    numbers = spread(len(profile.prompt_prices), PROMPTS)
    options = [profile.options[o] for o in choice[heads]]
    tried = [profile.spec.single_head(profile.spec.shape.heads[u], option) for u, option in zip(heads, options)]
    measured, _ = replays.measure(tried, "checking prices", numbers)  # [prompts, heads]
    return _compared(profile.prompt_prices[numbers][:, heads, choice[heads]].astype(np.float64), measured)


def _sample(prices: NDArray[np.float64]) -> NDArray[np.int64]:
    """Heads: those of the highest prices, and as many that are spread over the rest."""
    order = np.argsort(-prices, kind="stable")
    if len(order) <= HEADS:
        return order
    spread = np.linspace(HEADS // 2, len(order) - 1, HEADS - HEADS // 2).round().astype(int)
    return order[np.append(np.arange(HEADS // 2), spread)]


def _compared(prices: NDArray[np.float64], measured: NDArray[np.float64]) -> PriceCheck:
    """From [prompts, heads] of each."""
    draws = np.random.default_rng(0).integers(0, len(prices), (RESAMPLES, len(prices)))
    predicted, found = prices.sum(1), measured.sum(1)  # [prompts]
    with np.errstate(divide="ignore", invalid="ignore"):  # nothing is lost: no ratio, and the check fails
        ratio = found.sum() / predicted.sum()
        low, high = np.percentile(found[draws].sum(1) / predicted[draws].sum(1), (2.5, 97.5))
    ranks = rankdata(prices.mean(0)), rankdata(measured.mean(0))
    return PriceCheck(
        heads=prices.shape[1],
        prompts=len(prices),
        rank_correlation=float(np.corrcoef(*ranks)[0, 1]) if np.ptp(ranks, axis=1).all() else nan,
        ratio=float(ratio),
        ratio_interval=(float(low), float(high)),
    )
