"""Calibration: the gradient proposes what every option costs, then the options that the solver chooses are measured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedModel

from ib_analysis.episodes import Episode
from ib_analysis.errors import BudgetError, CalibrationError, ProfileMismatchError
from ib_analysis.knapsack import Solution
from ib_analysis.options import head_options
from ib_analysis.parallel import in_order, prompts_at_once
from ib_analysis.plan import HeadPlan, Pinned, Plans
from ib_analysis.pricing import gradient_prices
from ib_analysis.profile import Profile, model_fingerprint
from ib_analysis.replay import PlansToTry, Replay
from ib_analysis.scorers import SCORERS
from ib_analysis.shape import CacheShape, cache_shape

MOST_ROUNDS = 200
SETTLED = 0.05
ROUGH_GAP = 0.1  # of the solutions whose options are measured
SAVE_EVERY = 8  # prompts
KEPT_BYTES = 2**30  # prefilled contexts are kept up to this many bytes, and computed again beyond
SAME = ("model", "shape", "pinned", "scorer", "context_length", "settings", "options")  # of a profile that is used again
DIGESTED = 256  # elements of each weight
PINNED_SHARE = 1 / 4  # of the budget, at most
MOST_SINKS, MOST_WINDOW, MOST_FLUSH = 4, 32, 16


class Replays:
    """Episodes ready to be replayed. Their contexts are kept while memory lasts."""

    def __init__(
        self, model: PreTrainedModel, shape: CacheShape, pinned: Pinned, scorer: str, episodes: Sequence[Episode]
    ) -> None:
        self.episodes = episodes
        self._make: Callable[[Episode], Replay] = lambda episode: Replay(model, shape, pinned, SCORERS[scorer], episode)
        self.at_once = prompts_at_once(model, model.device)
        self._kept: dict[int, Replay] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self.episodes)

    def __iter__(self) -> Iterator[Replay]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, number: int) -> Replay:
        replay = self._kept.get(number)
        if replay is None:
            replay = self._make(self.episodes[number])
            if self._kept_bytes + replay.nbytes <= KEPT_BYTES:
                self._kept[number] = replay
                self._kept_bytes += replay.nbytes
        return replay

    @cached_property
    def ends(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(KL in bits per predicted token of evicting all that can be, accuracy of the full cache), [episodes] each."""
        shape = self[0].shape
        kl_bits, accuracy = self.measure([null_plans(shape), (None,) * len(shape.layers)])
        return kl_bits[:, 0], accuracy[:, 1]

    def measure(
        self, tried: Sequence[PlansToTry], show: str = "", numbers: Sequence[int] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(KL in bits per predicted token, accuracy), [episodes, A] each; `show` names a progress bar.

        `numbers` are the episodes to measure, by default all.
        """
        numbers = range(len(self)) if numbers is None else numbers
        measured = in_order(lambda number: self[number].measure(tried), numbers, self.at_once)
        rows = list(tqdm(measured, desc=show, total=len(numbers), disable=not show, leave=False))
        return (
            torch.stack([kl_bits for kl_bits, _ in rows]).cpu().numpy(),
            torch.stack([accuracy for _, accuracy in rows]).cpu().numpy(),
        )


def pinned_for(share: float, context_length: int) -> Pinned:
    """Sinks and window that take at most a quarter of a budget, at most 4 and 32 tokens. At least one token each."""
    tokens = int(PINNED_SHARE * share * context_length)
    sinks = min(MOST_SINKS, max(1, tokens // 4))
    flush = min(MOST_FLUSH, max(1, tokens // 4))
    return Pinned(sinks, min(MOST_WINDOW, max(1, tokens - sinks - flush + 1)), flush)


def null_plans(shape: CacheShape) -> Plans:
    """Every compressible token evicted."""
    nothing = HeadPlan("rotated")
    return tuple(None if layer.sliding_window else (nothing,) * layer.kv_heads for layer in shape.layers)


def calibrate(
    replays: Replays,
    model: PreTrainedModel,
    pinned: Pinned,
    scorer: str,
    context_length: int,
    *,
    settings: dict[str, Any],
    seed: int = 0,
    path: Path | None = None,
) -> Profile:
    """A profile with gradient prices. With `path` it is saved as it grows, and a killed calibration goes on from there.

    `settings` say how the prompts were made; a file with other settings, scorer or pinned tokens is overwritten.
    Raises ProfileMismatchError for the file of another model.
    """
    profile = _new_profile(
        replays, model, pinned, scorer, context_length, settings | {"seed": seed, "weights": weights_digest(model)}
    )
    if path is not None and path.exists():
        found = Profile.load(path)
        if (found.model, found.settings["weights"]) != (profile.model, profile.settings["weights"]):
            raise ProfileMismatchError(
                f"{path} is the profile of a model with another config or other weights: name another file"
            )
        if all(getattr(found, name) == getattr(profile, name) for name in SAME):
            profile = found
    known = profile.priced
    for number, replay in enumerate(tqdm(replays, desc="pricing", leave=False)):
        if number < known:
            continue
        generator = torch.Generator(device=model.device).manual_seed(seed * 1_000_003 + number)
        prices = gradient_prices(replay, profile.options, generator).cpu().numpy()
        if not np.isfinite(prices).all():
            raise CalibrationError(f"gradients are not finite on prompt {number} ({replay.episode.task})")
        profile.loss_bits += (prices - profile.loss_bits) / (number + 1)
        profile.priced = number + 1
        if path is not None and profile.priced % SAVE_EVERY == 0:
            profile.save(path)
    if path is not None and profile.priced > known:
        profile.save(path)
    return profile


def weights_digest(model: PreTrainedModel) -> str:
    """A hash of the first elements of every weight: a model trained further is another model."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().flatten()[:DIGESTED].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _new_profile(
    replays: Replays, model: PreTrainedModel, pinned: Pinned, scorer: str, context_length: int, settings: dict[str, Any]
) -> Profile:
    shape = cache_shape(model.config)
    options = tuple(head_options())
    size = (len(shape.heads), len(options))
    digest = hashlib.sha256()
    for episode in replays.episodes:
        digest.update(str((episode.prefill.tolist(), episode.followup.tolist())).encode())
    return Profile(
        model=model_fingerprint(model.config),
        shape=shape,
        pinned=pinned,
        scorer=scorer,
        context_length=context_length,
        prompts=len(replays),
        settings=settings | {"prompts": digest.hexdigest()[:16]},
        options=options,
        loss_bits=np.zeros(size),
        error_bits=np.full(size, np.inf),
        measured=np.zeros(size, dtype=bool),
    )


def verify(profile: Profile, replays: Replays, limits_bytes: Sequence[int], path: Path | None = None) -> int:
    """Lazy measurement: solve, measure the chosen options that are not measured yet, until that changes nothing.

    It ends at a limit when the best choice among measured options is within 5% of the best among all, whose unmeasured
    prices are proposals, mostly too low. Both are the solver's first answers: the next rounds revise them anyway.
    Returns the number of measurements. Raises CalibrationError if this takes more than 200 rounds.
    """
    count, unsettled = 0, list(limits_bytes)
    with tqdm(desc="measuring options", leave=False) as progress:
        for _ in range(MOST_ROUNDS):
            found = {limit: _to_measure(profile, limit) for limit in unsettled}
            unsettled = [limit for limit in unsettled if found[limit]]
            if not unsettled:
                return count
            pairs = sorted(set().union(*found.values()))
            measure_options(profile, replays, pairs)
            count += len(pairs)
            progress.update(len(pairs))
            if path is not None:
                profile.save(path)
    raise CalibrationError(f"the chosen options did not settle in {MOST_ROUNDS} rounds: pass more prompts")


def _to_measure(profile: Profile, limit_bytes: int) -> set[tuple[int, int]]:
    """(head, option) to measure: those of the best choice, and those of the best one if they turn out to be useless.

    Only what is not measured yet; nothing if measuring the best choice could gain no more than 5%.
    """
    solution = profile.solve(limit_bytes, gap=ROUGH_GAP)
    pairs = _unmeasured(profile, solution)
    if not pairs:
        return pairs
    if profile.measured.any(1).all():
        try:
            verified = profile.solve(limit_bytes, profile.measured_bits, gap=ROUGH_GAP)
            if verified.loss <= (1 + SETTLED) * solution.loss:
                return set()
        except BudgetError:  # the measured options are too large
            pass
    useless = profile.loss_bits.copy()
    for head, option in pairs:
        useless[head, profile.unmeasured_below(head, option)] = profile.loss_bits.max()
    return pairs | _unmeasured(profile, profile.solve(limit_bytes, useless, gap=ROUGH_GAP))


def _unmeasured(profile: Profile, solution: Solution) -> set[tuple[int, int]]:
    """(head, option) that the solution chooses and that are not measured."""
    return {(head, option) for head, option in enumerate(solution.choice.tolist()) if not profile.measured[head, option]}


def measure_options(profile: Profile, replays: Replays, pairs: Sequence[tuple[int, int]]) -> None:
    """Measures (head, option) pairs, each with all other heads left as they are, and enters the prices."""
    kl_bits, _ = replays.measure([_single_head(profile, head, option) for head, option in pairs])
    errors = kl_bits.std(0, ddof=1) / np.sqrt(len(kl_bits)) if len(kl_bits) > 1 else np.full(len(pairs), np.inf)
    for (head, option), loss, error in zip(pairs, kl_bits.mean(0), errors):
        profile.record(head, option, float(loss), float(error))


def _single_head(profile: Profile, head: int, option: int) -> PlansToTry:
    layer, kv_head = profile.shape.heads[head]
    rows: list[list[HeadPlan | None] | None] = [None] * len(profile.shape.layers)
    row: list[HeadPlan | None] = [None] * profile.shape.layers[layer].kv_heads
    row[kv_head] = profile.options[option]
    rows[layer] = row
    return rows
