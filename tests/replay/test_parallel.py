"""Several prompts at a time give what one at a time gives."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ib_analysis.replay.parallel import in_order, prompts_at_once

CPU = torch.device("cpu")


def tiny(**settings):
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**size, vocab_size=30, **settings))


class RopeByLayer(nn.Module):
    rope_type: ClassVar = {"full_attention": "longrope", "sliding_attention": "default"}


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_results_come_in_order_and_threads_are_as_before(at_once):
    threads, seen = torch.get_num_threads(), set()

    def square(number):
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return number**2

    assert list(in_order(square, range(20), at_once)) == [number**2 for number in range(20)]
    assert torch.get_num_threads() == threads
    if at_once == 1:
        assert seen == {(threading.get_ident(), threads)}
    else:
        assert len({thread for thread, _ in seen}) <= at_once and {cores for _, cores in seen} == {1}


def test_an_error_ends_it():
    threads = torch.get_num_threads()
    done = []

    def fail(number):
        done.append(number)
        if number == 3:
            raise ValueError("prompt 3")

    with pytest.raises(ValueError, match="prompt 3"):
        list(in_order(fail, range(10_000), 2))
    assert len(done) < 10_000 and torch.get_num_threads() == threads


def test_leaving_early_ends_it():
    threads = torch.get_num_threads()
    results = in_order(abs, range(10_000), 2)
    assert next(results) == 0
    results.close()
    assert torch.get_num_threads() == threads


def test_one_at_a_time_where_prompts_would_disturb_each_other():
    plain = tiny()
    assert prompts_at_once(plain, CPU) == min(4, torch.get_num_threads())
    assert prompts_at_once(plain, torch.device("cuda")) == 1
    factors = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert prompts_at_once(tiny(rope_parameters=factors), CPU) == 1
    assert prompts_at_once(RopeByLayer(), CPU) == 1


def test_a_second_interrupt_ends_the_wait(monkeypatch):
    done, asked, numbers = threading.Event(), [], []
    shutdown, set_num_threads = ThreadPoolExecutor.shutdown, torch.set_num_threads

    def impatient(self, **settings):
        asked.append(settings)
        shutdown(self, wait=False, **settings)
        raise KeyboardInterrupt("the second")

    def interrupted(number):
        if number == 0:
            raise KeyboardInterrupt("the first")
        done.wait(60)

    def noted(number):
        numbers.append((threading.current_thread(), number))
        set_num_threads(number)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", impatient)
    monkeypatch.setattr(torch, "set_num_threads", noted)
    try:
        with pytest.raises(KeyboardInterrupt, match="the second"):
            list(in_order(interrupted, range(100), 2))
    finally:
        done.set()
    assert asked == [{"cancel_futures": True}]
    assert (threading.current_thread(), torch.get_num_threads()) in numbers  # set again, for those parts that know but one
