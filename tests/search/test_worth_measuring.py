"""Few options are measured, and the choice is nearly that of measuring all."""

import numpy as np
import pytest

from ib_analysis.cache.plan import Recent
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS
from ib_analysis.search.calibration import calibrate
from ib_analysis.search.profile import Profile
from ib_analysis.search.worth_measuring import measure_options, measure_worthwhile, spread

pytestmark = pytest.mark.slow

SHARES = (1 / 8, 1 / 4, 1 / 2)


@pytest.fixture
def calibrated(small_llama, small_prompts):
    spec = CacheSpec(cache_shape(small_llama.config), Recent(2, 5, 2), SCORERS["value_aware"])
    replays = Replays(small_llama, spec, make_examples(small_llama, None, small_prompts))
    return calibrate(replays, 112, settings={}), replays


def test_the_choice_is_nearly_that_of_measuring_all(calibrated):
    profile, replays = calibrated
    heads, options = profile.price_bits.shape
    everything = [(head, option) for head in range(heads) for option in range(options)]
    tried = [profile.spec.single_head(profile.spec.shape.heads[head], profile.options[option]) for head, option in everything]
    truth = replays.measure(tried)[0].mean(0).reshape(heads, options)
    limits, every = [profile.limit(share) for share in SHARES], np.arange(heads)
    by_prices = [truth[every, profile.solve(limit).choice].sum() for limit in limits]
    measure_worthwhile(profile, replays, limits)
    assert 0 < (profile.measured_prompts > 0).sum() < heads * options / 20
    chosen = [truth[every, profile.solve(limit).choice].sum() for limit in limits]
    assert all(loss <= 1.2 * profile.solve(limit, truth).loss for limit, loss in zip(limits, chosen))
    assert np.prod(np.divide(chosen, by_prices)) < 1  # better over the budgets, though perhaps not at each
    measured = profile.loss_bits.copy()
    measure_worthwhile(profile, replays, limits)  # nothing is left
    np.testing.assert_array_equal(profile.loss_bits, measured)


def test_a_search_that_was_killed_goes_on_to_the_same(calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr("ib_analysis.search.worth_measuring.MAX_OPTIONS", 4)
    profile, replays = calibrated
    path, limits = tmp_path / "profile.safetensors", [profile.limit(1 / 4)]
    profile.save(path)
    measure_worthwhile(profile, replays, limits, tmp_path / "whole.safetensors")
    rounds, measure = 0, measure_options

    def killed(*arguments):
        nonlocal rounds
        rounds += 1
        if rounds == 2:
            raise KeyboardInterrupt
        measure(*arguments)

    monkeypatch.setattr("ib_analysis.search.worth_measuring.measure_options", killed)
    with pytest.raises(KeyboardInterrupt):
        measure_worthwhile(Profile.load(path), replays, limits, path)
    measure_worthwhile(Profile.load(path), replays, limits, path)
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_few_prompts_first_then_all(calibrated, monkeypatch):
    monkeypatch.setattr("ib_analysis.search.worth_measuring.FIRST_PROMPTS", 3)
    profile, replays = calibrated
    assert len(replays) > 3
    measure_options(profile, replays, {(0, 7), (1, 9)})
    assert profile.measured_prompts[[0, 1], [7, 9]].tolist() == [3, 3] and (profile.error_bits[[0, 1], [7, 9]] > 0).all()
    measure_options(profile, replays, {(0, 7), (0, 3)})
    assert profile.measured_prompts[0, [7, 3]].tolist() == [len(replays), 3] and profile.error_bits[0, 7] == 0


def test_measured_is_each_head_alone(calibrated):
    profile, replays = calibrated
    measure_options(profile, replays, {(1, 5), (3, 300)})
    for (head, option), (layer, h) in (((1, 5), (0, 1)), ((3, 300), (1, 1))):
        alone = replays.measure([profile.spec.single_head((layer, h), profile.options[option])])[0].mean()
        assert profile.loss_bits[head, option] == pytest.approx(alone, rel=1e-5)


def test_a_few_are_evenly_spread():
    assert spread(64, 16)[:3] == [0, 4, 8] and spread(64, 16)[-1] == 63 and len(spread(64, 16)) == 16
    assert spread(3, 16) == [0, 1, 2] and spread(1, 16) == [0]
