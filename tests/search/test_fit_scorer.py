"""The learned scorer is fitted: to known weights, to a model, once for a calibration."""

import numpy as np
import pytest
import torch

import ib_analysis.search.calibration as ib_calibration
from ib_analysis.cache.plan import Recent
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replay import Replay
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS
from ib_analysis.scorers.learned import SIGNS, Learned
from ib_analysis.search.calibration import calibrate
from ib_analysis.search.clock import Clock
from ib_analysis.search.fit_scorer import _regress, fit_scorer, read_tokens
from ib_analysis.search.profile import Profile
from ib_analysis.search.token_losses import token_losses
from ib_analysis.tasks.mixture import mixture

RECENT = Recent(1, 8, 4)


def test_known_weights_are_found():
    """Losses that are exponentials of weighted signs, the same up to a factor for each prompt."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 0.4, len(SIGNS))
    prompts = []
    for factor in (1.0, 1e-6, 1e3, 20.0):
        signs = torch.tensor(rng.normal(size=(500, len(SIGNS))) * np.linspace(0.1, 3, len(SIGNS)))
        prompts.append((signs, factor * (signs @ torch.tensor(truth)).exp()))
    found = np.array(_regress(prompts))
    every = torch.cat([signs for signs, _ in prompts]).numpy()
    assert np.corrcoef(every @ found, every @ truth)[0, 1] > 0.98


def test_a_head_that_loses_nothing_prefers_nothing():
    assert _regress([(torch.randn(9, len(SIGNS)), torch.zeros(9))]) == (0.0,) * len(SIGNS)


@pytest.mark.slow
def test_it_keeps_more_of_what_would_be_lost_on_other_prompts_than_value_aware(embedded):
    model, tokenizer = embedded
    examples = make_examples(model, tokenizer, mixture("fit", 24, 256))
    spec = CacheSpec(cache_shape(model.config), RECENT, SCORERS["learned"])
    found, again = (fit_scorer(spec, [rows for rows, _ in read_tokens(Replays(model, spec, examples[:16]))]) for _ in range(2))
    assert [len(layer) for layer in found.weights] == [layer.kv_heads for layer in spec.shape.layers]
    assert found == again
    kept = {}
    for scorer in (found, SCORERS["value_aware"]):
        shares = []
        for example in examples[16:]:
            replay = Replay(model, CacheSpec(spec.shape, RECENT, scorer), example)
            losses = token_losses(replay, torch.Generator().manual_seed(0)).evicted  # [U, n]
            compressible = slice(replay.first, replay.first + replay.tokens)
            scores = torch.cat([replay.context(layer).scores[:, compressible] for layer in spec.shape.compressible])
            best = scores.topk(replay.tokens // 8).indices
            shares.append(losses.gather(1, best).sum(1) / losses.sum(1))
        kept[scorer] = float(torch.stack(shares).mean())
    assert kept[found] > kept[SCORERS["value_aware"]] + 0.05


@pytest.mark.slow
def test_a_calibration_fits_once_and_is_used_again(small_llama, small_prompts, tmp_path, monkeypatch):
    examples = make_examples(small_llama, None, small_prompts[:2])
    path = tmp_path / "profile.safetensors"

    def calibrated(scorer):
        replays = Replays(small_llama, CacheSpec(cache_shape(small_llama.config), RECENT, scorer), examples)
        profile = calibrate(replays, 112, settings={}, path=path)
        assert replays.spec == profile.spec
        return profile.spec.scorer

    first = calibrated(Learned())
    assert first.weights and Profile.load(path).spec.scorer == first
    with monkeypatch.context() as patch:
        patch.setattr(ib_calibration, "read_tokens", None)  # it is not asked again
        assert calibrated(Learned()) == calibrated(first) == first
    other = Learned(tuple(tuple((1.0,) * len(SIGNS) for _ in layer) for layer in first.weights))
    assert calibrated(other) == other  # weights of one's own are never those of a file


@pytest.mark.slow
def test_what_was_learned_in_too_little_time_is_not_used_again(small_llama, small_prompts, tmp_path):
    examples = make_examples(small_llama, None, small_prompts[:2])
    spec, path = CacheSpec(cache_shape(small_llama.config), RECENT, Learned()), tmp_path / "profile.safetensors"
    hurried, clock = Replays(small_llama, spec, examples), Clock(minutes=1e-6)
    hurried.at_once, hurried.check = 1, clock.check
    cut = calibrate(hurried, 112, settings={}, path=path, clock=clock)
    assert cut.settings["learned_prompts"] == 1 and clock.cut[0] == "learning"
    cut.save(path)
    whole = calibrate(Replays(small_llama, spec, examples), 112, settings={}, path=path)
    assert "learned_prompts" not in whole.settings and whole.spec != cut.spec
    assert calibrate(Replays(small_llama, spec, examples), 112, settings={}).spec == whole.spec
