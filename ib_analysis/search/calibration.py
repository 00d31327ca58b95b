"""Calibration: the gradient proposes what every option loses, then the options that the solver chooses are measured."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ib_analysis.cache.spec import ByteLimit
from ib_analysis.errors import BudgetError, CalibrationError, ProfileMismatchError
from ib_analysis.model.fingerprint import model_fingerprint, weights_digest
from ib_analysis.replay.replays import Replays
from ib_analysis.search.candidates import head_options
from ib_analysis.search.clock import Clock
from ib_analysis.search.gradient import gradient_losses
from ib_analysis.search.knapsack import Solution
from ib_analysis.search.profile import Profile

MAX_ROUNDS = 200
SETTLED = 0.05
ROUGH_GAP = 0.1  # of the solutions whose options are measured
SAVE_EVERY = 8  # prompts
PRICES_UNTIL = 0.7  # of the time that a search may take
SAME = ("model", "spec", "context_length", "settings", "options")  # of a profile that is used again


def calibrate(
    replays: Replays,
    context_length: int,
    *,
    settings: dict[str, Any],
    seed: int = 0,
    path: Path | None = None,
    clock: Clock | None = None,
) -> Profile:
    """A profile with the gradient's losses. With `path` it is saved as it grows, and a killed calibration goes on from there.

    `settings` say how the prompts were made; a file with other settings, scorer, sinks or window is overwritten. A clock may cut
    it short: then the losses are those of the prompts so far, at least one.
    Raises ProfileMismatchError for the file of another model.
    """
    profile = _new_profile(replays, context_length, settings | {"seed": seed})
    if path is not None and path.exists():
        found = Profile.load(path)
        if (found.model, found.settings["weights"]) != (profile.model, profile.settings["weights"]):
            raise ProfileMismatchError(
                f"{path} is the profile of a model with another config or other weights: name another file"
            )
        if all(getattr(found, name) == getattr(profile, name) for name in SAME):
            profile = found
    if clock is None:
        _add_prices(profile, replays, seed, path)
    else:
        clock.attempt("gradients", lambda: _add_prices(profile, replays, seed, path), PRICES_UNTIL, begin_late=True)
    return profile


def _add_prices(profile: Profile, replays: Replays, seed: int, path: Path | None) -> None:
    """The gradient's losses of the prompts that the profile has not seen yet, into their mean."""
    known = profile.gradient_prompts

    def losses_of(number: int) -> NDArray[np.float64]:
        generator = torch.Generator(device=replays.model.device).manual_seed(seed * 1_000_003 + number)
        found: NDArray[np.float64] = gradient_losses(replays[number], profile.options, generator).cpu().numpy()
        if not np.isfinite(found).all():
            raise CalibrationError(f"gradients are not finite on prompt {number} ({replays.examples[number].task})")
        return found

    # Closed, so that the model is given back at once if the profile cannot be saved.
    with closing(replays.each(losses_of, range(known, len(replays)), "gradients")) as found:
        for number, losses in enumerate(found, known):
            profile.loss_bits = profile.loss_bits + (losses - profile.loss_bits) / (number + 1)
            profile.gradient_prompts = number + 1
            if path is not None and (profile.gradient_prompts % SAVE_EVERY == 0 or profile.gradient_prompts == len(replays)):
                profile.save(path)


def _new_profile(replays: Replays, context_length: int, settings: dict[str, Any]) -> Profile:
    options = tuple(head_options())
    size = (len(replays.spec.shape.heads), len(options))
    digest = hashlib.sha256()
    for example in replays.examples:
        digest.update(str((example.prefill.tolist(), example.followup.tolist())).encode())
    return Profile(
        model=model_fingerprint(replays.model.config),
        spec=replays.spec,
        context_length=context_length,
        prompts=len(replays),
        settings=settings | {"prompts": digest.hexdigest()[:16], "weights": weights_digest(replays.model)},
        options=options,
        loss_bits=np.zeros(size),
        measured=np.zeros(size, dtype=bool),
    )


def verify(profile: Profile, replays: Replays, limits: Sequence[ByteLimit], path: Path | None = None) -> None:
    """Lazy measurement: solve, measure the chosen options that are not measured yet, until that changes nothing.

    It ends at a limit when the best choice among measured options is within 5% of the best among all, whose unmeasured
    losses are proposals, mostly too low. Both are the solver's first answers: the next rounds revise them anyway.
    Raises CalibrationError if this takes more than 200 rounds.
    """
    unsettled = list(limits)
    with tqdm(desc="measuring options", leave=False) as progress:
        for _ in range(MAX_ROUNDS):
            found = [_to_measure(profile, limit) for limit in unsettled]
            unsettled = [limit for limit, pairs in zip(unsettled, found) if pairs]
            if not unsettled:
                return
            pairs = sorted(set().union(*found))
            measure_options(profile, replays, pairs)
            progress.update(len(pairs))
            if path is not None:
                profile.save(path)
    raise CalibrationError(f"the chosen options did not settle in {MAX_ROUNDS} rounds: pass more prompts")


def _to_measure(profile: Profile, limit: ByteLimit) -> set[tuple[int, int]]:
    """(head, option) to measure: those of the best choice, and those of the best one if they turn out to be useless.

    Only what is not measured yet; nothing if measuring the best choice could gain no more than 5%.
    """
    solution = profile.solve(limit, gap=ROUGH_GAP)
    pairs = _unmeasured(profile, solution)
    if not pairs:
        return pairs
    if profile.measured.any(1).all():
        try:
            verified = profile.solve(limit, profile.measured_bits, gap=ROUGH_GAP)
            if verified.loss <= (1 + SETTLED) * solution.loss:
                return set()
        except BudgetError:  # the measured options are too large
            pass
    useless = profile.loss_bits.copy()
    for head, option in pairs:
        useless[head, profile.unmeasured_below(head, option)] = profile.loss_bits.max()
    return pairs | _unmeasured(profile, profile.solve(limit, useless, gap=ROUGH_GAP))


def _unmeasured(profile: Profile, solution: Solution) -> set[tuple[int, int]]:
    """(head, option) that the solution chooses and that are not measured."""
    return {(head, option) for head, option in enumerate(solution.choice.tolist()) if not profile.measured[head, option]}


def measure_options(profile: Profile, replays: Replays, pairs: Sequence[tuple[int, int]]) -> None:
    """Measures (head, option) pairs, each with all other heads left as they are, and enters the losses."""
    heads = profile.spec.shape.heads
    kl_bits, _ = replays.measure([profile.spec.single_head(heads[head], profile.options[option]) for head, option in pairs])
    for (head, option), loss in zip(pairs, kl_bits.mean(0)):
        profile.record(head, option, float(loss))
