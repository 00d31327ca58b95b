"""Which saved calibrations are used again."""

import pytest

import ib_analysis.calibration as ib_calibration
from ib_analysis.calibration import Replays, calibrate
from ib_analysis.episodes import make_episodes
from ib_analysis.plan import Pinned
from ib_analysis.profile import Profile
from ib_analysis.shape import cache_shape

PINNED = Pinned(1, 8, 4)


@pytest.fixture
def priced(small_llama, small_prompts, tmp_path, monkeypatch):
    """A function that calibrates, always with one file: (profile, prompts that were priced for it)."""
    episodes, calls = make_episodes(small_llama, None, small_prompts[:2]), []
    original = ib_calibration.gradient_prices

    def counted(*args):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(ib_calibration, "gradient_prices", counted)

    def calibrated(pinned, scorer):
        calls.clear()
        replays = Replays(small_llama, cache_shape(small_llama.config), pinned, scorer, episodes)
        path = tmp_path / "profile.safetensors"
        return calibrate(replays, small_llama, pinned, scorer, settings={}, path=path), len(calls)

    return calibrated


def test_a_finished_calibration_is_saved_and_used_again(priced, tmp_path):
    first, count = priced(PINNED, "value_aware")
    assert count == 2 and Profile.load(tmp_path / "profile.safetensors").priced == 2
    again, count = priced(PINNED, "value_aware")
    assert count == 0 and (again.loss_bits == first.loss_bits).all()


@pytest.mark.parametrize(("pinned", "scorer"), [(PINNED, "snapkv"), (Pinned(1, 16, 4), "value_aware")])
def test_that_of_another_scorer_or_other_pinned_tokens_is_not(pinned, scorer, priced):
    priced(PINNED, "value_aware")
    found, count = priced(pinned, scorer)
    assert count == 2
    assert (found.pinned, found.scorer) == (pinned, scorer)
