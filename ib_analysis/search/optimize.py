"""From a model and a budget to an allocation: calibrate, choose, and let held-out prompts decide."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, nan
from numbers import Real
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.cache.plan import Plans, PlansToTry, Recent
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.errors import CalibrationError, UnknownNameError
from ib_analysis.files import check_writable, expanded
from ib_analysis.model.fingerprint import model_fingerprint
from ib_analysis.model.load import check_model
from ib_analysis.model.shape import cache_shape
from ib_analysis.policies import POLICIES
from ib_analysis.replay.examples import PROMPT_LENGTH, Example, Prompts, check_lengths, make_examples, median_length
from ib_analysis.replay.measurement import best_plans, sample_plans
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import DEFAULT, Scorer, get_scorer, scorer_to_json
from ib_analysis.search.allocation import Allocation
from ib_analysis.search.budget import Budget
from ib_analysis.search.calibration import calibrate, own_path
from ib_analysis.search.clock import Clock
from ib_analysis.search.knapsack import Solution, curve
from ib_analysis.search.objectives import OBJECTIVES, USABLE, objective_names, objective_tables
from ib_analysis.search.price_check import HEADS, check_prices
from ib_analysis.search.profile import Profile
from ib_analysis.search.worth_measuring import measure_worthwhile
from ib_analysis.tasks.mixture import mixture

PROMPTS = 64  # for calibration; half as many more decide between allocations
FEW_PROMPTS = 32
PROBE = 12  # prompts that tell how long one takes, where the time is limited
CLEAR = 1.0  # standard errors by which other plans must be better than the optimizer's
# Shares of a limited time: that prompts may take to be sampled, and when stages end.
SAMPLED_SHARE, CHECKED_UNTIL, MEASURED_UNTIL = 0.25, 0.8, 0.9


@dataclass(eq=False)
class Workbench:
    """A calibrated model: what one calibration leaves for allocations at any budget."""

    profile: Profile
    calibration: Replays
    validation: Replays
    path: Path | None
    clock: Clock = field(default_factory=Clock)
    tables: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # what options keep by an objective: [U, O] each

    def losses(self, objective: str) -> NDArray[np.float64]:
        """What every option of every head loses by an objective, in bits: [U, O]. Only the usable loss is measured lazily."""
        if objective == USABLE:
            return self.profile.expected_bits
        if objective not in self.tables:
            together = OBJECTIVES if objective in OBJECTIVES else (objective,)  # the streamed ones take one pass
            self.tables |= objective_tables(self.calibration, self.profile.options, together, show="measuring information")
        kept = self.tables[objective]
        return kept.max(1, keepdims=True) - kept

    def prices_hold(self, share: float) -> bool:
        """Whether a sample of heads loses what their prices say.

        Of few heads what matters is measured in any case: that takes little, and they lose less on other prompts even where
        prices hold.
        """
        profile = self.profile
        if len(profile.price_bits) <= HEADS:
            return False
        if share not in profile.checks:
            choice = profile.solve(profile.limit(share)).choice
            profile.checks[share] = check_prices(profile, self.calibration, choice)
            if self.path is not None:
                profile.save(self.path)
        return profile.checks[share].holds

    def measure(self, limits: Sequence[ByteLimit]) -> None:
        """Measures what could change the choice within the limits, unless prices hold there."""
        limits = [limit for limit in limits if not self.prices_hold(limit.share)]
        measure_worthwhile(self.profile, self.calibration, limits, self.path)

    def solve(self, limit: ByteLimit, objective: str) -> tuple[Solution, ByteLimit]:
        """The options of least loss by the objective, summed over heads, within the limit at all lengths, and the lowered limit.

        By the usable objective, those are measured first that could change the choice, unless prices hold.
        """
        profile = self.profile
        if objective != USABLE:
            return profile.solve_at_all_lengths(limit, lambda lowered: profile.solve(lowered, self.losses(objective)))

        def measured(lowered: ByteLimit) -> Solution:
            self.measure([lowered])
            return profile.solve(lowered)

        self.clock.attempt("checking prices", lambda: self.prices_hold(limit.share), CHECKED_UNTIL)
        found = self.clock.attempt("measuring heads", lambda: profile.solve_at_all_lengths(limit, measured), MEASURED_UNTIL)
        return found or profile.solve_at_all_lengths(limit, profile.solve)


@torch.inference_mode(False)  # where the caller has it on, nothing could be differentiated
def optimal_allocation(
    model: PreTrainedModel,
    budget: Budget | float,
    *,
    prompts: Prompts | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scorer: str | Scorer = DEFAULT,
    objective: str = USABLE,
    question_aware: bool = True,
    seed: int = 0,
    profile_path: str | Path | None = None,
    minutes: float | None = None,
) -> Allocation:
    """The allocation of tokens and bits to layers and KV heads that retains most information within `budget`.

    The model is left as it was.

    Args:
        model: a decoder with transformers' attention interface; measure in float32 if you can.
        budget: a share of the 16-bit cache in (0, 1], or a `Budget`. Every byte counts, metadata included. It holds from the
            median length of the prompts on, or, if it is in bytes, from the context length that it is named for.
        prompts: texts, 1-D tensors of token ids, conversations (lists of messages, for a tokenizer with a chat template), or
            `Prompt`s; a third of them decide, the others calibrate. By default 96 of the package's own.
        tokenizer: for prompts that are no token ids; by default the one saved with the model.
        scorer: a name in SCORERS, or a scorer itself, as SnapKV(window=16); one that is in no registry cannot be saved. By
            default one that is fitted to the model and the prompts, as part of the calibration.
        objective: which information the heads retain most of: "usable", about the next tokens, or one that
            `ib_analysis.search.objectives.objective_names()` lists, which tells of the cache itself. These are cheap, but they do
            not know what the model does with a cache: `ib-analysis objectives` shows what that costs. No policy stands in for
            them.
        question_aware: whether the scorer sees a prompt's first question before the cache is compressed.
        profile_path: where the calibration is saved; a killed one goes on from there, a finished one is used again
            if prompts, scorer, sinks and windows (which the budget decides) are the same. Another one stays as it is, and this
            is saved beside it, as NAME-2.safetensors, say.
        minutes: about how long it may take; by default as long as its stages need: prices of all options from gradients, a check
            of them on a sample of heads, measurement of the options that could change the choice if the check fails, a decision
            on prompts that none of these has seen. What is cut short, by the time or by Ctrl-C, leaves
            the best allocation so far, with a warning.

    Raises BudgetError, CalibrationError, UnknownNameError, UnsupportedModelError, ProfileMismatchError.
    """
    check_model(model)
    budget, scorer = Budget.of(budget), get_scorer(scorer)
    check_name("objective", objective, objective_names())
    shape = cache_shape(model.config)
    # A number of tokens is a share of the prompts' length, which is not known yet; all else at 1 needs no prompts.
    if budget.unit != "tokens" and budget.as_share(shape.bytes_per_token, PROMPT_LENGTH) == 1:
        return full_allocation(model, scorer, objective)
    clock = Clock(_checked_minutes(minutes))
    examples = _examples_in_time(model, prompts, tokenizer, question_aware, seed, clock)
    share = budget.as_share(shape.bytes_per_token, median_length(examples))
    if share == 1:
        return full_allocation(model, scorer, objective)
    with clock.listening():
        bench = prepare(
            model,
            examples,
            share,
            context_length=budget.context_length,
            scorer=scorer,
            question_aware=question_aware,
            seed=seed,
            profile_path=profile_path,
            clock=clock,
        )
        allocation = allocate(bench, share, objective)
    if clock.cut:
        reason = "an interrupt" if clock.interrupted else f"{minutes:g} minutes"
        warnings.warn(f"{reason} ended {', '.join(dict.fromkeys(clock.cut))}: this is the best allocation so far", stacklevel=2)
    return allocation


def _checked_minutes(minutes: float | None) -> float | None:
    if minutes is not None and not (isinstance(minutes, Real) and not isinstance(minutes, bool) and 0 < minutes < inf):
        raise CalibrationError(f"minutes is a number above 0, or None for as long as it takes, not {minutes!r}")
    return minutes


def _examples_in_time(
    model: PreTrainedModel,
    prompts: Prompts | None,
    tokenizer: PreTrainedTokenizerBase | None,
    question_aware: bool,
    seed: int,
    clock: Clock,
) -> list[Example]:
    """Examples of the prompts; of so many as a third of the time suffices for, but for one probe of a few, if it is limited."""
    if prompts is None:
        prompts = mixture(f"calibration {seed}", PROMPTS * 3 // 2, PROMPT_LENGTH)
    if clock.seconds == inf or not hasattr(prompts, "__len__") or isinstance(prompts, str) or len(prompts) <= PROBE:
        return make_examples(model, tokenizer, prompts, question_aware=question_aware, seed=seed)
    begin = monotonic()
    found = make_examples(model, tokenizer, prompts[:PROBE], question_aware=question_aware, seed=seed)
    count = int(clock.seconds * SAMPLED_SHARE / (monotonic() - begin) * PROBE)
    if count > PROBE:
        found += make_examples(model, tokenizer, prompts[PROBE:count], question_aware=question_aware, seed=seed)
    return found


def full_allocation(model: PreTrainedModel, scorer: Scorer, objective: str = USABLE) -> Allocation:
    """Nothing is compressed: the whole budget."""
    recent = replace(Recent.within(1.0, PROMPT_LENGTH), quantized=0)
    spec = CacheSpec(cache_shape(model.config), recent, scorer)
    return Allocation(
        model=model_fingerprint(model.config),
        spec=spec,
        plans=spec.full_plans,
        context_length=PROMPT_LENGTH,
        budget_share=1.0,
        source="full cache",
        loss_sum_bits=0.0,
        in_sample_loss_bits=0.0,
        solver_gap=0.0,
        dual_bound=0.0,
        validation=None,
        objective=objective,
    )


def prepare(
    model: PreTrainedModel,
    examples: Sequence[Example],
    smallest_share: float,
    *,
    context_length: int | None = None,
    scorer: str | Scorer = DEFAULT,
    question_aware: bool = True,
    seed: int = 0,
    profile_path: str | Path | None = None,
    clock: Clock | None = None,
) -> Workbench:
    """Calibrates for budgets from `smallest_share` up. A third of the examples is kept for decisions.

    Budgets hold from `context_length` on, by default the median length of the prompts. A clock may cut this and what is allocated
    later short.
    """
    deciding, calibrating = list(examples[2::3]), [example for i, example in enumerate(examples) if i % 3 != 2]
    prompt_length = median_length(calibrating)
    length = prompt_length if context_length is None else context_length
    recent = Recent.within(smallest_share, min(prompt_length, length))  # small beside the prompts, or little is left to measure
    spec = CacheSpec(cache_shape(model.config), recent, get_scorer(scorer))
    ByteLimit(spec, smallest_share, length).check()
    check_lengths(examples, spec.recent)
    if not deciding:
        raise CalibrationError(f"{len(examples)} prompts cannot be split: pass 3 or more, 96 are a good number")
    if len(calibrating) < FEW_PROMPTS:
        warnings.warn(
            f"{len(calibrating)} prompts calibrate: fewer than {FEW_PROMPTS} can be worse than a uniform allocation",
            stacklevel=3,
        )
    path = None if profile_path is None else expanded(profile_path)
    if path is not None:
        check_writable(path)
        scorer_to_json(spec.scorer)  # one that cannot be saved fails here, not after the work
    calibration, clock = Replays(model, spec, calibrating), clock or Clock()
    calibration.check = clock.check
    settings = {"question_aware": question_aware}
    path = None if path is None else own_path(path, calibration, length, settings=settings, seed=seed)
    profile = calibrate(calibration, length, settings=settings, seed=seed, path=path, clock=clock)
    validation = Replays(model, profile.spec, deciding)  # of which the scorer may have been fitted
    validation.check = clock.check
    return Workbench(profile, calibration, validation, path, clock)


def allocate(bench: Workbench, share: float, objective: str = USABLE) -> Allocation:
    """The best allocation within `share` of the full 16-bit cache, from the context length of the profile on.

    Raises BudgetError if nothing fits.
    """
    return allocate_all(bench, [share], objective)[0]


def allocate_all(bench: Workbench, shares: Sequence[float], objective: str = USABLE) -> list[Allocation]:
    """The best allocation for each share. Plans are measured together for all of them, which is faster than one by one.

    Raises BudgetError if nothing fits.
    """
    profile, clock = bench.profile, bench.clock
    limits = [profile.limit(share) for share in shares]
    if objective == USABLE and len(shares) > 1:
        _measure_all(bench, limits)
    solutions = [bench.solve(limit, objective)[0] for limit in limits]
    candidates = [_candidates(profile, limit, solution, objective) for limit, solution in zip(limits, solutions)]
    grids = [list(some) for some in candidates]
    best = clock.attempt("deciding", lambda: _decide(bench.validation, grids)) or [0] * len(shares)
    chosen = [grid[index] for grid, index in zip(grids, best)]
    sample = clock.attempt("validating", lambda: sample_plans(bench.validation, chosen))
    calibrated = clock.attempt("validating", lambda: bench.calibration.measure(chosen)[0])  # [prompts, shares]
    path = curve(list(bench.losses(objective)), list(profile.nbytes()))
    recent_bytes = profile.spec.recent_bytes(profile.context_length)
    full_bytes = profile.spec.shape.bytes_per_token * profile.context_length
    budget_curve = tuple(((int(cost) + recent_bytes) / full_bytes, float(loss)) for cost, loss in zip(path.cost, path.loss))
    allocations = []
    for number, (solution, plans) in enumerate(zip(solutions, chosen)):
        alone = solution.loss if best[number] == 0 else clock.attempt("heads alone", partial(loss_sum_bits, bench, plans))
        seen = [] if calibrated is None or sample is None else [*calibrated[:, number], *sample.kl_bits[:, number]]
        allocations.append(
            Allocation(
                model=profile.model,
                spec=profile.spec.for_plans(plans),
                plans=plans,
                context_length=profile.context_length,
                budget_share=shares[number],
                source=candidates[number][plans],
                objective=objective,
                loss_sum_bits=nan if alone is None else alone,
                in_sample_loss_bits=float(np.mean(seen)) if seen else nan,
                solver_gap=solution.gap,
                dual_bound=solution.dual_bound,
                validation=None if sample is None else sample.measurement(number),
                budget_curve=budget_curve,
            )
        )
    return allocations


def _measure_all(bench: Workbench, limits: Sequence[ByteLimit]) -> None:
    """Measures what matters at any of the limits, before one is solved for good.

    So the same profile, read from its file, gives the same allocations.
    """
    measured = -1
    bench.measure(limits)
    while measured < (known := int(bench.profile.measured_prompts.sum())):
        measured = known
        for limit in limits:
            bench.solve(limit, USABLE)


def _candidates(profile: Profile, limit: ByteLimit, solution: Solution, objective: str) -> dict[Plans, str]:
    """Plans within the limit and where they come from: the solver's first, then the cells of all policies.

    Where heads stand in for each other, a cell may be better.
    """
    if objective != USABLE:
        return {profile.plans(solution.choice): f"optimal by {objective}"}
    found = {profile.plans(solution.choice): "optimal"}
    for policy in POLICIES.values():
        for cell in policy(profile.spec, limit):
            found.setdefault(cell.plans, f"{cell.family}, {cell.setting}")
    return found


def _decide(validation: Replays, grids: Sequence[Sequence[Plans]]) -> list[int]:
    """Of each grid the index of the plans to take: the first, unless others lose less by more than chance.

    Of a hundred cells some lose less on a few dozen prompts than plans that are better, so one standard error is asked for (the
    rule of Breiman et al. 1984 for choosing the simpler of models).
    """
    best = best_plans(validation, grids, "deciding")
    better = [number for number, index in enumerate(best) if index]
    if not better or len(validation) < 2:
        return best
    kl_bits, _ = validation.measure([grids[number][index] for number in better for index in (0, best[number])])
    gains = kl_bits[:, 0::2] - kl_bits[:, 1::2]  # [prompts, better]
    clear = gains.mean(0) > CLEAR * gains.std(0, ddof=1) / len(gains) ** 0.5
    return [index if index == 0 or clear[better.index(number)] else 0 for number, index in enumerate(best)]


def loss_sum_bits(bench: Workbench, plans: Plans) -> float:
    """Sum over heads of the measured loss of compressing that head alone, on the calibration prompts."""
    tried: list[PlansToTry] = [
        bench.profile.spec.single_head((layer, h), plan) for layer, row in enumerate(plans) for h, plan in enumerate(row or ())
    ]
    kl_bits, _ = bench.calibration.measure(tried)
    return float(kl_bits.mean(0).sum())


def check_name(what: str, name: str, names: Collection[str]) -> None:
    """Raises UnknownNameError, which lists the names, for any other."""
    if not isinstance(name, str) or name not in names:
        raise UnknownNameError(f"there is no {what} {name!r}: use one of {', '.join(names)}")
