"""Many examples: in their order, as each of them alone, whether kept or computed again, one or several at a time."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from ib_analysis.cache.attention import NAME
from ib_analysis.cache.plan import HeadPlan, Recent, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replay import Replay, ReplayLayer
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS


@pytest.fixture
def replays(small_llama, small_prompts):
    spec = CacheSpec(cache_shape(small_llama.config), Recent(2, 5, 2), SCORERS["value_aware"])
    return Replays(small_llama, spec, make_examples(small_llama, None, small_prompts))


@pytest.fixture
def tried(replays):
    spec = replays.spec
    return [spec.null_plans, spec.full_plans, spec.uniform(HeadPlan("kivi", (Tier(0.5, 2, 2),)))]


def test_each_is_measured_as_alone(replays, tried):
    kl_bits, accuracy = replays.measure(tried)
    assert kl_bits.shape == accuracy.shape == (6, 3) == (len(replays), len(tried))
    for example, row in zip(replays.examples, kl_bits):
        alone, _ = Replay(replays.model, replays.spec, example).measure(tried)
        np.testing.assert_array_equal(alone.numpy(), row)
    assert np.isnan(accuracy).all()  # token ids have no known answers
    assert (kl_bits[:, 1] == 0).all() and (kl_bits[:, 0] > kl_bits[:, 2]).all()


def test_some_of_them_in_the_order_asked_for(replays, tried):
    everything, some = replays.measure(tried)[0], replays.measure(tried, numbers=[4, 0, 4])[0]
    np.testing.assert_array_equal(some, everything[[4, 0, 4]])


def test_ends_are_the_null_and_the_full_cache(replays, tried):
    information_bits, full_accuracy = replays.ends
    np.testing.assert_allclose(information_bits, replays.measure(tried)[0][:, 0], rtol=1e-5)
    assert full_accuracy.shape == (6,) and replays.ends[0] is information_bits


@pytest.mark.parametrize("kept", [0, 1, 3, 6])
def test_contexts_are_kept_while_memory_lasts(kept, replays, tried, monkeypatch):
    expected = replays.measure(tried)[0]
    size, example = replays[0].nbytes, replays.examples[0]
    context = 2 * 2 * 2 * len(example.prefill) * 8  # keys and values, layers, heads, tokens, channels
    assert size == 4 * (context + len(example.predicting) * replays.model.config.vocab_size)
    monkeypatch.setattr("ib_analysis.replay.replays.KEPT_BYTES", kept * size)
    again = Replays(replays.model, replays.spec, replays.examples)
    again.at_once = 1  # several would come in any order
    np.testing.assert_array_equal(again.measure(tried)[0], expected)
    assert [again[i] is again[i] for i in range(6)] == [i < kept for i in range(6)]
    assert [replay.example for replay in again] == replays.examples


def test_several_at_a_time_are_one_at_a_time(replays, tried, monkeypatch):
    expected, seen = replays.measure(tried)[0], set()
    attend = ReplayLayer.attend

    def seen_attend(self, *args):
        seen.add((threading.get_ident(), replays.model.config._attn_implementation))
        return attend(self, *args)

    monkeypatch.setattr(ReplayLayer, "attend", seen_attend)
    replays.at_once = 3
    np.testing.assert_allclose(replays.measure(tried)[0], expected, rtol=1e-4, atol=1e-7)
    assert {name for _, name in seen} == {NAME} and threading.get_ident() not in {thread for thread, _ in seen}
    assert replays.model.config._attn_implementation == "sdpa"


def test_no_gradient_is_kept(replays, tried):
    replays.measure(tried)
    with torch.enable_grad():
        assert not replays[0].measure(tried)[0].requires_grad
    assert not replays[0].full_log_probs.requires_grad


MEASURED = """
import ib_analysis as ib
from ib_analysis.cache.plan import Recent
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replays import Replays

model, tokenizer = ib.load()
spec = CacheSpec(cache_shape(model.config), Recent(1, 2, 1), ib.scorers.get_scorer("value_aware"))
examples = make_examples(model, tokenizer, ["one two three four five six seven"] * 3)
Replays(model, spec, examples).measure([spec.null_plans], {show!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("show", "disabled", "seen"), [("heads", "", True), ("heads", "1", False), ("", "", False)])
def test_bars_are_named_and_can_be_turned_off(show, disabled, seen):
    """In a process of its own, because tqdm reads TQDM_DISABLE when it is imported."""
    environment = os.environ | {"TQDM_DISABLE": disabled}
    command = [sys.executable, "-c", MEASURED.format(show=show)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ("heads: " in found.stderr) == seen
