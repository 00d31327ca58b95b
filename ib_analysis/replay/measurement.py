"""Measured information of a compressed cache, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan
from sys import float_info
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.cache.plan import Plans
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.files import number_from_json
from ib_analysis.replay.examples import Prompts, make_examples
from ib_analysis.replay.replays import Replays

RESAMPLES = 2000
LEVEL = 95  # percent
ROUNDING = 1e-3  # losses of a plan depend that little on the plans that are measured with it
PILOT = 16  # of so many prompts, one finds the plan to beat


@dataclass(frozen=True)
class Measurement:
    """Loss and information in bits per predicted token, means over prompts; intervals at 95% by bootstrap over prompts.

    loss = E KL(p || r), p the full model and r the compressed one. information = E KL(p || p_null), p_null the model with
    all compressible tokens evicted. What is retained is their difference, usable information (predictive V-information,
    Xu et al. 2020, arXiv 2002.10689): what the compressed cache tells this model about the next token. It is negative if
    the compressed cache misleads. With T the compressed cache, Y the next token, C the tokens at 16 bits and the
    follow-up, and pbar_X the mean of p given X,
    retained = I(T; Y | C) + E KL(pbar_C || p_null) - E KL(pbar_TC || r): a lower bound on I(T; Y | C) only if p_null is
    calibrated, that is pbar_C = p_null.
    Intervals of a single prompt are NaN.
    """

    prompts: int
    loss_bits: float
    loss_interval_bits: tuple[float, float]
    information_bits: float
    accuracy: float | None  # share of known answers whose first token is the most likely one; None if none is known
    full_accuracy: float | None  # of the full cache
    lengths: tuple[int, int] | None = None  # tokens of the shortest and longest context; None in files of older versions

    @property
    def retained_bits(self) -> float:
        return self.information_bits - self.loss_bits

    @property
    def retained_share(self) -> float:
        return self.retained_bits / self.information_bits if self.information_bits > 0 else float("nan")

    def __str__(self) -> str:
        low, high = self.loss_interval_bits
        interval = "(too few prompts for an interval)" if isnan(low) else f"[{low:.4f}, {high:.4f}]"
        count = "1 prompt" if self.prompts == 1 else f"{self.prompts} prompts"
        lengths = "" if self.lengths is None else " at " + " to ".join(f"{n:,}" for n in dict.fromkeys(self.lengths)) + " tokens"
        share = "" if isnan(self.retained_share) else f" ({self.retained_share:.1%})"
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.3f} (full {self.full_accuracy:.3f})"
        return (
            f"retains {self.retained_bits:.3f} of {self.information_bits:.3f} bits per token{share}, "
            f"loses {self.loss_bits:.4f} {interval}{accuracy} ({count}{lengths})"
        )

    @classmethod
    def from_json(cls, content: dict[str, Any] | None) -> Measurement | None:
        if content is None:
            return None
        low, high = map(number_from_json, content["loss_interval_bits"])
        numbers = {name: number_from_json(content[name]) for name in ("loss_bits", "information_bits")}
        lengths = content.get("lengths")
        exact = {"loss_interval_bits": (low, high), "lengths": None if lengths is None else tuple(lengths)}
        return cls(**{**content, **numbers, **exact})


@dataclass(frozen=True, eq=False)
class Sample:
    """The raw measurement of several plans on the same prompts."""

    kl_bits: NDArray[np.float64]  # [examples, plans]
    accuracy: NDArray[np.float64]  # [examples, plans], NaN where no answer is known
    information_bits: NDArray[np.float64]  # [examples]
    full_accuracy: NDArray[np.float64]  # [examples]
    lengths: Sequence[int]  # tokens of each context

    def measurement(self, plan: int) -> Measurement:
        """The summary of one of the plans."""
        losses = self.kl_bits[:, plan]
        return Measurement(
            prompts=len(losses),
            loss_bits=float(losses.mean()),
            loss_interval_bits=bootstrap_interval(losses),
            information_bits=float(self.information_bits.mean()),
            accuracy=_mean_of_known(self.accuracy[:, plan]),
            full_accuracy=_mean_of_known(self.full_accuracy),
            lengths=(min(self.lengths), max(self.lengths)),
        )

    def ratio_interval(self, plan: int, other: int) -> tuple[float, float, float]:
        """Mean loss of `plan` over that of `other`: (ratio, low, high), a paired bootstrap over prompts at 95%.

        The ends are NaN from fewer than two prompts.
        """
        return ratio_interval(self.kl_bits[:, plan], self.kl_bits[:, other])


def sample_plans(replays: Replays, plans: Sequence[Plans], show: str = "") -> Sample:
    """Measures plans, the null point and the full cache on every prompt."""
    information_bits, full_accuracy = replays.ends
    return Sample(*replays.measure(plans, show), information_bits, full_accuracy, replays.lengths)


def measure_plans(replays: Replays, plans: Sequence[Plans], show: str = "") -> list[Measurement]:
    """The measurement of each plan."""
    sample = sample_plans(replays, plans, show)
    return [sample.measurement(i) for i in range(len(plans))]


def measure_prompts(
    model: PreTrainedModel,
    spec: CacheSpec,
    plans: Plans,
    prompts: Prompts,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    question_aware: bool = True,
    seed: int = 1,
) -> Measurement:
    """The measurement of plans on prompts (see `make_examples` for what these may be)."""
    examples = make_examples(model, tokenizer, prompts, question_aware=question_aware, seed=seed)
    return measure_plans(Replays(model, spec, examples), [plans])[0]


def best_plans(replays: Replays, grids: Sequence[Sequence[Plans]], show: str = "") -> list[int]:
    """For each grid the index of the plan with the least mean loss over all prompts; the first where there is a tie.

    The plan of a grid that loses least on a few prompts is measured on all. The others meet the prompts on which these leaders
    lose most first, and are dropped as soon as they have lost more than their leader does on all prompts: no loss is
    negative, so the answer is exact, yet most plans are measured on few prompts. Grids share what they can: many plans at once
    take less time.
    """
    if all(len(grid) == 1 for grid in grids):
        return [0] * len(grids)
    different = list(dict.fromkeys(plans for grid in grids for plans in grid))
    index = {plans: number for number, plans in enumerate(different)}
    members = [np.array([index[plans] for plans in grid]) for grid in grids]
    few = -(-len(replays) // PILOT)
    losses = replays.measure(different, show, range(few))[0].sum(0)  # of each plan, on the prompts that it has met
    leaders = [int(some[losses[some].argmin()]) for some in members]
    leading, _ = replays.measure([different[leader] for leader in leaders], show)  # [examples, grids]
    losses[leaders] = leading.sum(0)
    to_beat = np.zeros(len(different))  # of each plan, the largest loss with which it wins a grid
    for some, leader in zip(members, leaders):
        to_beat[some] = np.maximum(to_beat[some], losses[leader] * (1 + ROUNDING))
    racing = np.setdiff1d(np.flatnonzero(losses <= to_beat), leaders)
    hardest = few + np.argsort(-(leading[few:] / leading.mean(0).clip(float_info.min)).sum(1), kind="stable")
    rounds = range(0, len(hardest), replays.at_once)
    for begin in tqdm(rounds, desc=show, leave=False) if show else rounds:
        if len(racing) == 0:
            break
        numbers = hardest[begin : begin + replays.at_once].tolist()
        losses[racing] += replays.measure([different[plan] for plan in racing.tolist()], numbers=numbers)[0].sum(0)
        racing = racing[losses[racing] <= to_beat[racing]]
    known = np.isin(np.arange(len(different)), [*leaders, *racing])
    return [int(np.where(known[some], losses[some], np.inf).argmin()) for some in members]


def bootstrap_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95% interval of the mean, resampling prompts; NaN from fewer than two."""
    if len(values) < 2:
        return nan, nan
    low, high = np.percentile(values[_draws(len(values))].mean(1), _percentiles())
    return float(low), float(high)


def ratio_interval(losses: NDArray[np.float64], others: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean of losses over the mean of others on the same prompts, with its 95% interval; see `Sample.ratio_interval`."""
    ratio = float(losses.mean() / others.mean())
    if len(losses) < 2:
        return ratio, nan, nan
    draws = _draws(len(losses))  # [R, examples]
    low, high = np.percentile(losses[draws].mean(1) / others[draws].mean(1), _percentiles())
    return ratio, float(low), float(high)


def _draws(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def _percentiles() -> tuple[float, float]:
    return (100 - LEVEL) / 2, (100 + LEVEL) / 2


def _mean_of_known(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
