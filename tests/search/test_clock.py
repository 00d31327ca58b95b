"""A search that is cut short, by the clock or by Ctrl-C, leaves a valid allocation, and goes on to the same result."""

import os
import random
import signal
import threading
from time import monotonic

import pytest
import torch

import ib_analysis as ib
from ib_analysis.errors import CalibrationError
from ib_analysis.search.clock import Clock

SHARE = 1 / 4  # of a cache whose heads interact: the search has all stages


def test_a_stage_that_ends_gives_its_result():
    clock = Clock()
    assert clock.attempt("one", lambda: 1) == 1
    assert clock.cut == []


def test_a_stage_without_time_is_cut():
    clock = Clock(minutes=1e-9)
    assert clock.attempt("late", lambda: pytest.fail("it began")) is None
    assert clock.cut == ["late"]


def test_a_stage_has_its_share_of_the_time():
    clock = Clock(minutes=1.0)
    clock.begin -= 40  # seconds
    assert clock.attempt("half", clock.check, until_share=0.5) is None
    assert clock.attempt("whole", lambda: 1) == 1
    assert clock.cut == ["half"]


def test_other_errors_are_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        Clock().attempt("broken", lambda: (_ for _ in ()).throw(KeyboardInterrupt))


def test_the_first_interrupt_waits_for_a_check_and_the_second_does_not():
    clock, before = Clock(), signal.getsignal(signal.SIGINT)
    with clock.listening():
        signal.raise_signal(signal.SIGINT)
        assert clock.interrupted
        assert clock.attempt("next", lambda: 1) is None
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_listens_to_nothing():
    def listen():
        with Clock().listening():
            found.append(signal.getsignal(signal.SIGINT))

    found: list[object] = []
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


@pytest.fixture(autouse=True)
def ctrl_c():
    """Also where tests run in the background, in which Python ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def prompts():
    """Ten of them calibrate: the profile is saved twice as it grows."""
    return list(torch.randint(3, 64, (15, 96), generator=torch.Generator().manual_seed(0)))


def search(model, prompts, **named):
    return ib.optimal_allocation(model, SHARE, prompts=prompts, **named)


@pytest.fixture(scope="module")
def whole(shared_llama, prompts):
    """An uninterrupted search and the seconds it takes when all that it needs is imported."""
    found, begin = search(shared_llama, prompts), monotonic()
    assert search(shared_llama, prompts) == found
    return found, monotonic() - begin


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*prompts calibrate", "ignore:.*ended")
@pytest.mark.parametrize("seed", range(10))
def test_interrupted_at_a_random_moment(shared_llama, prompts, whole, tmp_path, seed):
    path, (expected, seconds) = tmp_path / "profile.safetensors", whole
    timer = threading.Timer(random.Random(seed).uniform(0, seconds), os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        found = search(shared_llama, prompts, profile_path=path)
        limit = found.limit
        assert limit.excess(found.plans) == 0
        assert found.nbytes(found.context_length) <= limit.nbytes
        assert ib.Allocation.from_json(found.to_json()).plans == found.plans
    except KeyboardInterrupt:  # while prompts were sampled: there is nothing yet
        assert not path.exists()
    finally:
        timer.cancel()
    assert search(shared_llama, prompts, profile_path=path).to_json() == expected.to_json()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*prompts calibrate")
def test_minutes_are_kept_and_named(shared_llama, prompts):
    begin = monotonic()
    with pytest.warns(UserWarning, match=r"0\.001 minutes ended learning, gradients, .*deciding"):
        found = search(shared_llama, prompts, minutes=0.001)
    assert monotonic() - begin < 20  # with what it takes to load and to sample
    assert found.validation is None
    assert found.limit.excess(found.plans) == 0


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), True, "3"])
def test_bad_minutes(shared_llama, prompts, minutes):
    with pytest.raises(CalibrationError, match="minutes is a number above 0"):
        search(shared_llama, prompts, minutes=minutes)
