"""Calibration: the gradient's prices of every option of every head, prompt by prompt."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ib_kernels import FORMATS
from numpy.typing import NDArray
from torch import Tensor

from ib_analysis.errors import CalibrationError, CorruptFileError, ProfileMismatchError
from ib_analysis.model.devices import input_device
from ib_analysis.model.fingerprint import model_fingerprint, weights_digest
from ib_analysis.replay.examples import median_length
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers.learned import Learned
from ib_analysis.search.candidates import head_options
from ib_analysis.search.clock import Clock
from ib_analysis.search.fit_bases import at_lengths, fit_bases, summed
from ib_analysis.search.fit_scorer import TokenRows, fit_scorer, prompts_to_read, read_tokens, unfitted
from ib_analysis.search.gradient import gradient_losses
from ib_analysis.search.profile import Profile

SAVE_EVERY = 8  # prompts
LEARNED_UNTIL, PRICES_UNTIL = 0.4, 0.75  # of the time that a search may take
LEARNED_PROMPTS = "learned_prompts"  # a setting, of a search that had too little time to learn from all


def calibrate(
    replays: Replays,
    context_length: int,
    *,
    settings: dict[str, Any],
    seed: int = 0,
    path: Path | None = None,
    clock: Clock | None = None,
) -> Profile:
    """A profile with prices. With `path` it is saved as it grows, and a killed calibration goes on from there.

    `settings` say how the prompts were made; a file with other settings, scorer, sinks or windows is overwritten, as is one with
    options that are not used here, of a format without kernels on a GPU (see `own_path`). A clock may cut it short: then
    prices are those of the prompts so far, at least one. Bases of keys, and a learned scorer without weights, are fitted first,
    and in the profile's spec and that of `replays` from then on.
    Raises ProfileMismatchError for the file of another model.
    """
    seed = int(seed)  # NumPy's integers are no seeds to PyTorch
    profile = _new_profile(replays, context_length, settings | {"seed": seed})
    if path is not None and path.exists():
        found = Profile.load(path)
        if _is_of(found, profile, path) and found.settings == profile.settings:
            profile = found
    clock = clock or Clock()
    turns_keys = any(FORMATS[plan.format].turns_keys for plan in profile.options)
    if (turns_keys and profile.spec.bases is None) or profile.spec.scorer == Learned():
        rows: list[TokenRows] = []
        moments: list[Tensor] = []

        def learn() -> None:
            for row, more in read_tokens(replays, seed):  # one by one, so that those read before the time is up are there
                rows.append(row)
                moments[:] = summed(moments, more)

        clock.attempt("learning", learn, LEARNED_UNTIL, begin_late=True)
        scorer = fit_scorer(profile.spec, rows) if profile.spec.scorer == Learned() else profile.spec.scorer
        tokens = median_length(replays.examples)
        bases = fit_bases(profile.spec, at_lengths(replays.model, moments, tokens)) if turns_keys else None
        profile.spec = replace(profile.spec, scorer=scorer, bases=bases)
        if len(rows) < prompts_to_read(replays):  # said in the file, so that a search with more time learns again
            profile.settings = profile.settings | {LEARNED_PROMPTS: len(rows)}
    replays.spec = profile.spec
    clock.attempt("gradients", lambda: _add_prices(profile, replays, seed, path), PRICES_UNTIL, begin_late=True)
    return profile


def own_path(path: Path, replays: Replays, context_length: int, *, settings: dict[str, Any], seed: int = 0) -> Path:
    """`path`, or the first of NAME-2, NAME-3, ... beside it that is not there yet, or holds this calibration: the hours of
    another budget, or of other prompts, are not overwritten. Raises as `calibrate` does for `path` itself."""
    profile = _new_profile(replays, context_length, settings | {"seed": int(seed)})
    if not path.exists() or _is_of(Profile.load(path), profile, path):
        return path
    return next(beside for number in count(2) if _is_free(beside := path.with_stem(f"{path.stem}-{number}"), profile))


def _is_free(path: Path, profile: Profile) -> bool:
    if not path.exists():
        return True
    try:
        return _is_of(Profile.load(path), profile, path)
    except (CorruptFileError, ProfileMismatchError):  # somebody else's
        return False


def _is_of(found: Profile, profile: Profile, path: Path) -> bool:
    """Whether a profile from a file is of the same calibration, be it that it learned from fewer prompts."""
    if (found.model, found.settings["weights"]) != (profile.model, profile.settings["weights"]):
        raise ProfileMismatchError(f"{path} is the profile of a model with another config or other weights: name another file")
    alike = profile.spec in (found.spec, replace(found.spec, bases=None), unfitted(found.spec))
    alike = alike and set(found.options) <= set(profile.options)  # fewer, from a GPU or an older version, are no fault
    settings = {name: value for name, value in found.settings.items() if name != LEARNED_PROMPTS}
    return alike and found.context_length == profile.context_length and settings == profile.settings


def _add_prices(profile: Profile, replays: Replays, seed: int, path: Path | None) -> None:
    """Prices of the prompts that the profile has not seen yet."""
    known = len(profile.prompt_prices)

    def prices_of(number: int) -> NDArray[np.float32]:
        generator = torch.Generator(input_device(replays.model)).manual_seed(seed * 1_000_003 + number)
        found: NDArray[np.float32] = gradient_losses(replays[number], profile.options, generator).float().cpu().numpy()
        if not np.isfinite(found).all():
            raise CalibrationError(f"gradients are not finite on prompt {number} ({replays.examples[number].task})")
        return found

    # Closed, so that the model is given back at once if the profile cannot be saved.
    with closing(replays.each(prices_of, range(known, len(replays)), "gradients")) as found:
        for prices in found:
            profile.prompt_prices = np.concatenate([profile.prompt_prices, prices[None]])
            priced = len(profile.prompt_prices)
            if path is not None and (priced % SAVE_EVERY == 0 or priced == len(replays)):
                profile.save(path)


def usable_formats(replays: Replays) -> list[str]:
    """Those that fit the model's heads and are fast where it is: on a GPU those with kernels."""
    on_gpu = input_device(replays.model).type == "cuda"
    dims = {layer.head_dim for layer in replays.spec.shape.layers}
    fitting = [name for name, fmt in FORMATS.items() if all(dim % fmt.channels == 0 for dim in dims)]
    return [name for name in fitting if FORMATS[name].kernels is not None or not on_gpu]


def _new_profile(replays: Replays, context_length: int, settings: dict[str, Any]) -> Profile:
    options = tuple(head_options(usable_formats(replays)))
    digest = hashlib.sha256()
    for example in replays.examples:
        digest.update(str((example.prefill.tolist(), example.followup.tolist())).encode())
    return Profile.unmeasured(
        np.zeros((0, len(replays.spec.shape.heads), len(options)), dtype=np.float32),
        model=model_fingerprint(replays.model.config),
        spec=replays.spec,
        context_length=context_length,
        prompts=len(replays),
        settings=settings | {"prompts": digest.hexdigest()[:16], "weights": weights_digest(replays.model)},
        options=options,
    )
