"""Which saved calibrations are used again."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import ib_analysis.search.calibration as ib_calibration
from ib_analysis.cache.plan import Recent
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.errors import ProfileMismatchError
from ib_analysis.model.fingerprint import weights_digest
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS
from ib_analysis.search.calibration import calibrate, own_path
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


def test_a_killed_calibration_goes_on(bench, tmp_path, monkeypatch):
    """The losses are those of a calibration that was never interrupted."""
    path = tmp_path / "profile.safetensors"
    replays = bench.calibration
    expected = calibrate(replays, LENGTH, settings={}, seed=1)
    calls = 0
    original = ib_calibration.gradient_losses

    def killed(*args):
        nonlocal calls
        calls += 1
        if calls == 11:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(ib_calibration, "gradient_losses", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate(replays, LENGTH, path=path, settings={}, seed=1)
    assert len(Profile.load(path).prompt_prices) == 8
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    calls = 100
    resumed = calibrate(replays, LENGTH, path=path, settings={}, seed=1)
    assert calls == 100 + len(replays) - 8
    np.testing.assert_array_equal(resumed.prompt_prices, expected.prompt_prices)


def test_another_calibration_is_saved_beside_the_first(small_llama, small_prompts, tmp_path):
    path = tmp_path / "profile.safetensors"
    examples = make_examples(small_llama, None, small_prompts[:3])

    def place(recent=RECENT, seed=0, length=LENGTH, prompts=examples):
        replays = Replays(small_llama, CacheSpec(cache_shape(small_llama.config), recent, SCORERS["value_aware"]), prompts)
        found = own_path(path, replays, length, settings={}, seed=seed)
        if not found.exists():
            calibrate(replays, length, settings={}, seed=seed, path=found)
        return found.name

    other = replace(RECENT, window=RECENT.window + 1)
    names = [
        place(),
        place(other),
        place(),
        place(other),
        place(seed=1),
        place(other, length=LENGTH + 1),
        place(prompts=examples[:2]),
    ]
    numbers = ["", "-2", "", "-2", "-3", "-4", "-5"]
    assert names == [f"profile{number}.safetensors" for number in numbers]
    learned_less = Profile.load(path)
    learned_less.settings |= {"learned_prompts": 1}
    learned_less.save(path)
    assert place() == path.name  # learns again in the same place
    (tmp_path / "profile-6.safetensors").mkdir()
    (tmp_path / "profile-7.safetensors").write_text("notes")
    assert place(seed=2) == "profile-8.safetensors"


def test_a_model_trained_further_is_calibrated_again(bench, embedded, tmp_path):
    model, _ = embedded
    path = tmp_path / "profile.safetensors"
    calibrate(bench.calibration, LENGTH, settings={}, path=path)
    saved = Profile.load(path).settings["weights"]
    other = copy.deepcopy(model)
    other.model.norm.weight.data += 0.01
    assert weights_digest(other) != saved == weights_digest(model)


@pytest.mark.parametrize(("head_dim", "formats"), [(6, {"kivi", "rotated"}), (8, {"kivi", "rotated", "spectral"})])
def test_bases_are_fitted_where_a_format_that_fits_the_heads_has_them(head_dim, formats, small_prompts):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=64,
            hidden_size=24,
            head_dim=head_dim,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=1,
            intermediate_size=32,
            max_position_embeddings=512,
        )
    ).eval()
    spec = CacheSpec(cache_shape(model.config), RECENT, SCORERS["value_aware"])
    replays = Replays(model, spec, make_examples(model, None, small_prompts[:1]))
    profile = calibrate(replays, LENGTH, settings={})
    assert {option.format for option in profile.options} == formats == set(profile.spec.formats)
    assert (profile.spec.bases is None) == ("spectral" not in formats)
