"""Which saved calibrations are used again."""

import pytest

import ib_analysis.search.calibration as ib_calibration
from ib_analysis.cache.plan import Recent
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.errors import ProfileMismatchError
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS
from ib_analysis.search.calibration import calibrate
from ib_analysis.search.profile import Profile

pytestmark = pytest.mark.slow

RECENT = Recent(1, 8, 4)
LENGTH = 112


@pytest.fixture
def calibrated(small_llama, small_prompts, tmp_path, monkeypatch):
    """A function that calibrates, always with one file: (profile, prompts that the gradient saw for it)."""
    examples, calls = make_examples(small_llama, None, small_prompts[:2]), []
    original = ib_calibration.gradient_losses

    def counted(*args):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(ib_calibration, "gradient_losses", counted)

    def calibrated(recent, scorer, context_length=LENGTH):
        calls.clear()
        replays = Replays(small_llama, CacheSpec(cache_shape(small_llama.config), recent, SCORERS[scorer]), examples)
        return calibrate(replays, context_length, settings={}, path=tmp_path / "profile.safetensors"), len(calls)

    return calibrated


def test_a_finished_calibration_is_saved_and_used_again(calibrated, tmp_path):
    first, count = calibrated(RECENT, "value_aware")
    assert count == 2 and len(Profile.load(tmp_path / "profile.safetensors").prompt_prices) == 2
    again, count = calibrated(RECENT, "value_aware")
    assert count == 0 and (again.prompt_prices == first.prompt_prices).all()


@pytest.mark.parametrize(
    "other", [(RECENT, "snapkv", LENGTH), (Recent(1, 16, 4), "value_aware", LENGTH), (RECENT, "value_aware", LENGTH - 1)]
)
def test_that_of_another_scorer_other_sinks_and_window_or_another_length_is_not(other, calibrated):
    calibrated(RECENT, "value_aware")
    found, count = calibrated(*other)
    assert count == 2
    recent, scorer, context_length = other
    assert (found.spec.recent, found.spec.scorer, found.context_length) == (recent, SCORERS[scorer], context_length)


def test_that_of_another_model_is_kept(calibrated, small_llama, tmp_path):
    path = tmp_path / "profile.safetensors"
    calibrated(RECENT, "value_aware")
    before = path.read_bytes()
    small_llama.model.norm.weight.data += 0.01
    with pytest.raises(ProfileMismatchError, match=r"profile\.safetensors .* other weights: name another"):
        calibrated(RECENT, "value_aware")
    assert path.read_bytes() == before
