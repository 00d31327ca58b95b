"""Which saved calibrations are used again."""

import pytest

import ib_analysis.calibration as ib_calibration
from ib_analysis.calibration import Replays, calibrate
from ib_analysis.episodes import make_episodes
from ib_analysis.errors import ProfileMismatchError
from ib_analysis.plan import Pinned
from ib_analysis.profile import Profile
from ib_analysis.shape import cache_shape

PINNED = Pinned(1, 8, 4)
LENGTH = 112


@pytest.fixture
def priced(small_llama, small_prompts, tmp_path, monkeypatch):
    """A function that calibrates, always with one file: (profile, prompts that were priced for it)."""
    episodes, calls = make_episodes(small_llama, None, small_prompts[:2]), []
    original = ib_calibration.gradient_prices

    def counted(*args):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(ib_calibration, "gradient_prices", counted)

    def calibrated(pinned, scorer, context_length=LENGTH):
        calls.clear()
        replays = Replays(small_llama, cache_shape(small_llama.config), pinned, scorer, episodes)
        path = tmp_path / "profile.safetensors"
        return calibrate(replays, small_llama, pinned, scorer, context_length, settings={}, path=path), len(calls)

    return calibrated


def test_a_finished_calibration_is_saved_and_used_again(priced, tmp_path):
    first, count = priced(PINNED, "value_aware")
    assert count == 2 and Profile.load(tmp_path / "profile.safetensors").priced == 2
    again, count = priced(PINNED, "value_aware")
    assert count == 0 and (again.loss_bits == first.loss_bits).all()


@pytest.mark.parametrize(
    "other", [(PINNED, "snapkv", LENGTH), (Pinned(1, 16, 4), "value_aware", LENGTH), (PINNED, "value_aware", LENGTH - 1)]
)
def test_that_of_another_scorer_other_pinned_tokens_or_another_length_is_not(other, priced):
    priced(PINNED, "value_aware")
    found, count = priced(*other)
    assert count == 2
    assert (found.pinned, found.scorer, found.context_length) == other


def test_that_of_another_model_is_kept(priced, small_llama, tmp_path):
    path = tmp_path / "profile.safetensors"
    priced(PINNED, "value_aware")
    before = path.read_bytes()
    small_llama.model.norm.weight.data += 0.01
    with pytest.raises(ProfileMismatchError, match=r"profile\.safetensors .* other weights: name another"):
        priced(PINNED, "value_aware")
    assert path.read_bytes() == before
