"""From a model and a budget to an allocation: calibrate, choose, refine, and let held-out prompts decide."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.allocation import Allocation
from ib_analysis.budget import Budget
from ib_analysis.calibration import Replays, calibrate, null_plans, pinned_for, verify
from ib_analysis.episodes import Episode, make_episodes
from ib_analysis.errors import BudgetError, CalibrationError, UnknownNameError
from ib_analysis.files import check_writable
from ib_analysis.knapsack import Solution, curve
from ib_analysis.measurement import best_plan, sample_plans
from ib_analysis.models import check_model
from ib_analysis.objectives import OBJECTIVES, USABLE, objective_tables
from ib_analysis.plan import HeadPlan, Pinned, Plans, excess_bytes
from ib_analysis.policies.optimal import refine
from ib_analysis.policies.uniform import uniform_grid
from ib_analysis.profile import Profile, model_fingerprint
from ib_analysis.replay import PlansToTry
from ib_analysis.scorers import SCORERS
from ib_analysis.shape import CacheShape, cache_shape
from ib_analysis.tasks import Prompt
from ib_analysis.tasks.mixture import mixture

PROMPTS = 64  # for calibration; half as many more decide between allocations
FEW_PROMPTS = 32
PROMPT_LENGTH = 512
REFINED_FROM_BITS = 0.05  # predicted loss from which heads interact enough to be priced together

Prompts = Sequence[Prompt | str | Tensor]


@dataclass(eq=False)
class Workbench:
    """A calibrated model: what one calibration leaves for allocations at any budget."""

    model: PreTrainedModel
    profile: Profile
    calibration: Replays
    validation: Replays
    path: Path | None

    @cached_property
    def tables(self) -> dict[str, NDArray[np.float64]]:
        """What every option keeps by each objective but "usable", in bits per context token: [U, O] each."""
        return objective_tables(self.calibration, self.profile.options, show="measuring information")

    def losses(self, objective: str) -> NDArray[np.float64]:
        """What every option of every head loses by an objective, in bits: [U, O]. Only the usable loss is measured lazily."""
        if objective == USABLE:
            return self.profile.loss_bits
        kept = self.tables[objective]
        return kept.max(1, keepdims=True) - kept


def optimal_allocation(
    model: PreTrainedModel,
    budget: Budget | float,
    *,
    prompts: Prompts | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scorer: str = "value_aware",
    objective: str = USABLE,
    question_aware: bool = True,
    seed: int = 0,
    profile_path: str | Path | None = None,
) -> Allocation:
    """The allocation of tokens and bits to layers and KV heads that retains most information within `budget`.

    Args:
        model: a decoder with transformers' attention interface; measure in float32 if you can.
        budget: a share of the 16-bit cache in (0, 1], or a `Budget`. Every byte counts, metadata included. It holds from the
            median length of the prompts on, or, if it is in bytes at a shorter context, from that.
        prompts: texts, 1-D tensors of token ids, or `Prompt`s; a third of them decide, the others calibrate. By default
            96 of the package's own.
        tokenizer: for prompts that are text; by default the one saved with the model.
        scorer: a name in SCORERS.
        objective: which information the heads retain most of: "usable", about the next tokens, or what a name in
            `ib_analysis.objectives.OBJECTIVES` says of the cache itself. These are cheap, but they do not know what the
            model does with a cache: `ib-analysis objectives` shows what that costs. No uniform cell stands in for them.
        question_aware: whether the scorer sees a prompt's first question before the cache is compressed.
        profile_path: where the calibration is saved; a killed one goes on from there, a finished one is used again
            if prompts, scorer and pinned tokens (which the budget decides) are the same.

    Raises BudgetError, CalibrationError, UnknownNameError, UnsupportedModelError, ProfileMismatchError.
    """
    check_model(model)
    budget = Budget.of(budget)
    check_name("scorer", scorer, SCORERS)
    check_name("objective", objective, (USABLE, *OBJECTIVES))
    shape = cache_shape(model.config)
    # A number of tokens is a share of the prompts' length, which is not known yet; all else at 1 needs no prompts.
    if budget.unit != "tokens" and budget.as_share(shape.bytes_per_token, PROMPT_LENGTH) == 1:
        return full_allocation(model, shape, scorer, objective)
    episodes = episodes_for(model, prompts, tokenizer, question_aware, seed, PROMPTS * 3 // 2)
    length = int(np.median([len(episode.prefill) for episode in episodes]))
    share = budget.as_share(shape.bytes_per_token, length)
    if share == 1:
        return full_allocation(model, shape, scorer, objective)
    bench = prepare(
        model,
        episodes,
        share,
        context_length=budget.context_length,
        scorer=scorer,
        question_aware=question_aware,
        seed=seed,
        profile_path=profile_path,
    )
    return allocate(bench, share, objective)


def full_allocation(model: PreTrainedModel, shape: CacheShape, scorer: str, objective: str = USABLE) -> Allocation:
    """Nothing is compressed: the whole budget."""
    return Allocation(
        model=model_fingerprint(model.config),
        shape=shape,
        plans=(None,) * len(shape.layers),
        pinned=pinned_for(1.0, PROMPT_LENGTH),
        scorer=scorer,
        context_length=PROMPT_LENGTH,
        budget_share=1.0,
        source="full cache",
        price_sum_bits=0.0,
        predicted_loss_bits=0.0,
        solver_gap=0.0,
        dual_bound=0.0,
        validation=None,
        objective=objective,
    )


def prepare(
    model: PreTrainedModel,
    episodes: Sequence[Episode],
    smallest_share: float,
    *,
    context_length: int | None = None,
    scorer: str = "value_aware",
    question_aware: bool = True,
    seed: int = 0,
    profile_path: str | Path | None = None,
) -> Workbench:
    """Calibrates for budgets from `smallest_share` up. A third of the episodes is kept for decisions.

    Budgets hold from the median length of the prompts on, or from `context_length` if that is shorter.
    """
    shape = cache_shape(model.config)
    deciding, calibrating = list(episodes[2::3]), [episode for i, episode in enumerate(episodes) if i % 3 != 2]
    length = int(np.median([len(episode.prefill) for episode in calibrating]))
    length = length if context_length is None else min(length, context_length)
    pinned = pinned_for(smallest_share, length)
    _limit(shape, pinned, length, smallest_share)
    check_lengths(episodes, pinned)
    if not deciding:
        raise CalibrationError(f"{len(episodes)} prompts cannot be split: pass 3 or more, 96 are a good number")
    if len(calibrating) < FEW_PROMPTS:
        warnings.warn(
            f"{len(calibrating)} prompts calibrate: fewer than {FEW_PROMPTS} can be worse than a uniform allocation",
            stacklevel=3,
        )
    path = None if profile_path is None else Path(profile_path)
    if path is not None:
        check_writable(path)
    calibration = Replays(model, shape, pinned, scorer, calibrating)
    profile = calibrate(
        calibration,
        model,
        pinned,
        scorer,
        length,
        settings={"question_aware": question_aware},
        seed=seed,
        path=path,
    )
    return Workbench(model, profile, calibration, Replays(model, shape, pinned, scorer, deciding), path)


def allocate_all(bench: Workbench, shares: Sequence[float]) -> list[Allocation]:
    """The best allocation for each share. Their options are measured together, which is faster than one after the other."""
    profile = bench.profile
    limits = [_limit(profile.shape, profile.pinned, profile.context_length, share) for share in shares]
    verify(profile, bench.calibration, limits, bench.path)
    return [allocate(bench, share) for share in shares]


def allocate(bench: Workbench, share: float, objective: str = USABLE) -> Allocation:
    """The best allocation within `share` of the full 16-bit cache, from the context length of the profile on.

    Raises BudgetError if nothing fits.
    """
    profile = bench.profile
    limit = _limit(profile.shape, profile.pinned, profile.context_length, share)
    least = _pinned_bytes(profile.shape, profile.pinned, profile.context_length)  # nothing else is kept, which stays within
    while excess := profile.excess_bytes((solution := _solve(bench, limit, objective)).choice, share):
        limit = max(least, limit - excess)
    candidates = [("optimal" if objective == USABLE else f"optimal by {objective}", profile.plans(solution.choice))]
    if objective == USABLE:
        candidates += _alternatives(bench, share, limit, solution)
    sample = sample_plans(bench.validation, [candidate for _, candidate in candidates])
    best = int(sample.kl_bits.mean(0).argmin())
    source, chosen = candidates[best]
    path = curve(list(bench.losses(objective)), list(profile.nbytes()))
    pinned_bytes = _pinned_bytes(profile.shape, profile.pinned, profile.context_length)
    full_bytes = profile.shape.bytes_per_token * profile.context_length
    return Allocation(
        model=profile.model,
        shape=profile.shape,
        plans=chosen,
        pinned=profile.pinned,
        scorer=profile.scorer,
        context_length=profile.context_length,
        budget_share=share,
        source=source,
        objective=objective,
        price_sum_bits=solution.loss if best == 0 else price_sum_bits(bench, chosen),
        predicted_loss_bits=float(np.concatenate([bench.calibration.measure([chosen])[0][:, 0], sample.kl_bits[:, best]]).mean()),
        solver_gap=solution.gap,
        dual_bound=solution.dual_bound,
        validation=sample.measurement(best),
        budget_curve=tuple(((int(cost) + pinned_bytes) / full_bytes, float(loss)) for cost, loss in zip(path.cost, path.loss)),
    )


def _solve(bench: Workbench, limit_bytes: int, objective: str) -> Solution:
    """The options of least loss by the objective, summed over heads."""
    if objective != USABLE:
        return bench.profile.solve(limit_bytes, bench.losses(objective))
    verify(bench.profile, bench.calibration, [limit_bytes], bench.path)
    return bench.profile.solve(limit_bytes, bench.profile.measured_bits)


def _alternatives(bench: Workbench, share: float, limit_bytes: int, solution: Solution) -> list[tuple[str, Plans]]:
    """What may be better than a solution: moves around it, where heads interact, and the best uniform cell."""
    profile, found = bench.profile, []
    if solution.loss > REFINED_FROM_BITS:
        refined = refine(profile, bench.calibration, share, limit_bytes, solution.choice)
        found.append(("optimal, refined jointly", profile.plans(refined)))
    cells = uniform_grid(profile.shape, profile.pinned, profile.context_length, share)
    if cells:
        found.append(("uniform", cells[best_plan(bench.validation, cells, show="deciding")]))
    return found


def price_sum_bits(bench: Workbench, plans: Plans) -> float:
    """Sum over heads of the measured loss of compressing that head alone, on the calibration prompts."""
    tried: list[PlansToTry] = []
    for layer, row in enumerate(plans):
        for h, plan in enumerate(row or ()):
            heads: list[HeadPlan | None] = [None] * len(row or ())
            heads[h] = plan
            tried.append([heads if i == layer else None for i in range(len(plans))])
    kl_bits, _ = bench.calibration.measure(tried)
    return float(kl_bits.mean(0).sum())


def episodes_for(
    model: PreTrainedModel,
    prompts: Prompts | None,
    tokenizer: PreTrainedTokenizerBase | None,
    question_aware: bool,
    seed: int,
    count: int,
) -> list[Episode]:
    """Episodes of these prompts, by default of `count` of the package's own."""
    if prompts is None:
        prompts = mixture(f"calibration {seed}", count, PROMPT_LENGTH)
    return make_episodes(model, tokenizer, prompts, question_aware=question_aware, seed=seed)


def check_name(what: str, name: str, names: Collection[str]) -> None:
    if not isinstance(name, str) or name not in names:
        raise UnknownNameError(f"there is no {what} {name!r}: use one of {', '.join(names)}")


def check_lengths(episodes: Sequence[Episode], pinned: Pinned) -> None:
    for number, episode in enumerate(episodes):
        if len(episode.prefill) <= pinned.most:
            raise CalibrationError(
                f"prompt {number} has {len(episode.prefill)} tokens before its question, not more than the {pinned.most} "
                "that are never compressed: pass longer prompts"
            )


def _pinned_bytes(shape: CacheShape, pinned: Pinned, length: int) -> int:
    return sum(int(pinned.nbytes(length, shape.layers[i])) for i in shape.compressible)


def _limit(shape: CacheShape, pinned: Pinned, length: int, share: float) -> int:
    """Bytes of the budget at this context length.

    Raises BudgetError, with the minimum, if not even sinks and window fit from there on.
    """
    if excess_bytes(shape, null_plans(shape), pinned, share, length):
        fullest = pinned.before_leaving(length)
        full, minimum = shape.bytes_per_token * fullest, _pinned_bytes(shape, pinned, fullest)
        raise BudgetError(
            f"a budget of {share:.4g} of the cache is {int(share * full):,} bytes at {fullest} tokens, but sinks and window "
            f"take {minimum:,}: ask for at least {minimum / full:.4g}, or for a longer context (longer prompts)"
        )
    return int(share * shape.bytes_per_token * length)
