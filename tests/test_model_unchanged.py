"""Whoever measures a model leaves it as it was, however it ends; only `allocation.cache` switches its attention function."""

import copy
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import ib_analysis as ib
from ib_analysis.cache.attention import NAME, borrowed
from ib_analysis.cache.plan import HeadPlan, Recent, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.experiments.objective_costs import objective_costs
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replay import ReplayLayer
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS
from ib_analysis.search.optimize import full_allocation

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*prompts calibrate", "ignore:Plane.local is empty")]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
PLAN = HeadPlan("kivi", (Tier(0.5, 4, 4),))


@pytest.fixture(params=["eager", "sdpa"])
def model(request, small_llama):
    return AutoModelForCausalLM.from_config(small_llama.config, attn_implementation=request.param).eval()


@pytest.fixture(autouse=True)
def three_threads():
    """So that one thread, which workers have, is not what was before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def implementations(config):
    """The attention function of a config and of the configs within it."""
    parts = {name: getattr(config, name) for name in config.sub_configs}
    return [config._attn_implementation, {name: implementations(part) for name, part in parts.items() if part is not None}]


def state_of(model):
    """All that a caller could see, bit for bit."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "attention": implementations(model.config),
        "config": copy.deepcopy(model.config.to_dict()),
        "generation config": model.generation_config.to_dict(),
        "tensors": {name: (x.dtype, tuple(x.shape), x.data_ptr(), x.requires_grad) for name, x in tensors.items()},
        "bits": {name: x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, x in tensors.items()},
        "gradients": [name for name, x in model.named_parameters() if x.grad is not None],
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [dict(getattr(module, hooks)) for hooks in HOOKS] for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "threads": torch.get_num_threads(),
        "torch rng": torch.get_rng_state().numpy().tobytes(),
        "numpy rng": np.random.get_state(legacy=True)[1].tobytes(),  # type: ignore[index]  # noqa: NPY002 - what callers may use
        "python rng": random.getstate(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "dtype": torch.get_default_dtype(),
    }


def assert_unchanged(model, before):
    after = state_of(model)
    assert [name for name in before if after[name] != before[name]] == []
    if model.config._attn_implementation == "eager":
        attentions = model(torch.arange(3, 23)[None], output_attentions=True).attentions
        assert [tuple(weights.shape) for weights in attentions] == [(1, 4, 20, 20)] * 2
        assert all(torch.allclose(weights.sum(-1), torch.ones(1)) for weights in attentions)


def made_for(model, scorer):
    """An allocation that needed no measurement."""
    found = full_allocation(model, scorer)
    return replace(found, plans=found.spec.uniform(PLAN))


def replays_of(model, scorer, prompts):
    spec = CacheSpec(cache_shape(model.config), Recent(2, 5, 2), scorer)
    return Replays(model, spec, make_examples(model, None, prompts))


def measure(model, scorer, prompts):
    replays = replays_of(model, scorer, prompts)
    return replays.measure([replays.spec.uniform(PLAN)]), replays.ends


# Each is called with a model, a scorer and prompts.
CALLS = {
    "optimal_allocation": lambda model, scorer, prompts: ib.optimal_allocation(model, 1 / 4, prompts=prompts, scorer=scorer),
    "by an estimator": lambda model, scorer, prompts: ib.optimal_allocation(
        model, 1 / 4, prompts=prompts, scorer=scorer, objective="copula_gaussian"
    ),
    "full budget": lambda model, scorer, prompts: ib.optimal_allocation(model, 1.0, prompts=prompts, scorer=scorer),
    "validate": lambda model, scorer, prompts: made_for(model, scorer).validate(model, prompts),
    "information": lambda model, scorer, prompts: ib.information(
        model, made_for(model, scorer), prompts, estimators=("copula_gaussian",)
    ),
    "information_plane": lambda model, scorer, prompts: ib.information_plane(
        model, prompts=prompts, scorer=scorer, shares=(1 / 4,)
    ),
    "objective_costs": lambda model, scorer, prompts: objective_costs(model, prompts=prompts, scorer=scorer, shares=(1 / 4,)),
    "make_examples": lambda model, scorer, prompts: make_examples(model, None, prompts),
    "Replays.measure": measure,
}
MEASURING = [name for name in CALLS if name not in ("make_examples", "full budget")]


def at_once(monkeypatch, count):
    monkeypatch.setattr("ib_analysis.replay.replays.prompts_at_once", lambda model, device: count)


def raising_at(call, error, monkeypatch, only_workers=False):
    """The layers of a replay raise at a call, deep in the model's forward pass."""
    calls, attend = [], ReplayLayer.attend

    def raises(self, *args):
        if not only_workers or threading.current_thread() is not threading.main_thread():
            calls.append(threading.current_thread())
            if len(calls) == call:
                raise error
        return attend(self, *args)

    monkeypatch.setattr(ReplayLayer, "attend", raises)
    return calls


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_returns(name, model, small_prompts, monkeypatch):
    at_once(monkeypatch, 2 if model.config._attn_implementation == "eager" else 1)
    before = state_of(model)
    CALLS[name](model, SCORERS["value_aware"], small_prompts)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", MEASURING)
def test_a_scorer_that_raises(name, model, small_prompts, monkeypatch):
    at_once(monkeypatch, 2 if model.config._attn_implementation == "eager" else 1)
    calls = []

    def raises(*args):
        calls.append(args)
        if len(calls) == 3:
            raise ZeroDivisionError("the third call")
        return SCORERS["value_aware"](*args)

    before = state_of(model)
    with pytest.raises(ZeroDivisionError, match="the third call"):
        CALLS[name](model, raises, small_prompts)
    assert_unchanged(model, before)


@pytest.mark.parametrize("call", [2, 4, 40])  # in the full follow-up, with gradients, while plans are measured
@pytest.mark.parametrize("name", ["optimal_allocation", "information_plane"])
def test_an_interrupt_in_the_main_thread(name, call, model, small_prompts, monkeypatch):
    at_once(monkeypatch, 1)
    calls = raising_at(call, KeyboardInterrupt, monkeypatch)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        CALLS[name](model, SCORERS["value_aware"], small_prompts)
    assert len(calls) == call
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("call", [1, 7])
@pytest.mark.parametrize("name", ["optimal_allocation", "validate", "information", "information_plane", "Replays.measure"])
def test_an_interrupt_in_a_worker(name, call, error, model, small_prompts, monkeypatch):
    at_once(monkeypatch, 2)
    calls = raising_at(call, error, monkeypatch, only_workers=True)
    before = state_of(model)
    with pytest.raises(error):
        CALLS[name](model, SCORERS["value_aware"], small_prompts)
    assert len(calls) >= call
    assert_unchanged(model, before)


def test_control_c_while_workers_measure(model, small_prompts, monkeypatch):
    """The signal comes when all workers are in the middle of a forward pass."""
    assert threading.current_thread() is threading.main_thread()
    at_once(monkeypatch, 2)
    replays = replays_of(model, SCORERS["value_aware"], small_prompts)
    replays.measure([replays.spec.full_plans])
    attend, both, calls = ReplayLayer.attend, threading.Barrier(2, timeout=30), []

    def interrupts(self, *args):
        calls.append(1)
        if len(calls) <= 2 and both.wait() == 0:
            signal.raise_signal(signal.SIGINT)
        return attend(self, *args)

    monkeypatch.setattr(ReplayLayer, "attend", interrupts)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        replays.measure([replays.spec.null_plans] * 50)
    assert_unchanged(model, before)


def test_control_c_twice_while_workers_measure(model, small_prompts, monkeypatch):
    """The second one ends the wait for workers: the last of them gives the model back."""
    at_once(monkeypatch, 2)
    replays = replays_of(model, SCORERS["value_aware"], small_prompts)
    before = state_of(model)
    left, inside, go_on = [], threading.Barrier(3, timeout=30), threading.Event()
    attend, shutdown = ReplayLayer.attend, ThreadPoolExecutor.shutdown

    def waits(self, *args):
        if threading.current_thread() not in left:
            left.append(threading.current_thread())
            inside.wait()
            go_on.wait(30)
        return attend(self, *args)

    def interrupted(self, *args, **kwargs):
        inside.wait()
        raise KeyboardInterrupt("the first")

    def impatient(self, **settings):
        shutdown(self, wait=False, **settings)
        raise KeyboardInterrupt("the second")

    monkeypatch.setattr(ReplayLayer, "attend", waits)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", impatient)
    monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the second"):
        replays.measure([replays.spec.null_plans])
    assert len(left) == 2 and all(thread.is_alive() for thread in left)
    assert model.config._attn_implementation == NAME  # they are in the middle of a forward pass
    go_on.set()
    for thread in left:
        thread.join(30)
    assert_unchanged(model, before)


def test_borrowed_in_any_order(model):
    before = state_of(model)
    first, second = borrowed(model), borrowed(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.config._attn_implementation == NAME
    with borrowed(model):
        pass
    assert model.config._attn_implementation == NAME
    second.__exit__(None, None, None)
    assert_unchanged(model, before)


def test_only_the_cache_switches(model, small_prompts):
    before, allocation = state_of(model), made_for(model, SCORERS["value_aware"])
    allocation.cache(model)
    after = state_of(model)
    assert [name for name in before if after[name] != before[name]] == ["attention"]
    assert after["attention"] == [NAME, {}]
    allocation.validate(model, small_prompts[:2])  # and it stays so
    assert state_of(model)["attention"] == [NAME, {}]
