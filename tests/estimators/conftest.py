"""Draws from tasks of known information, shared by the tests of the estimators."""

from functools import lru_cache

import numpy as np
import pytest
import torch

from ib_analysis.estimators.known_information import KNOWN_TASKS


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def draws():
    """draws(task name, N, seeds): x [seeds, N, dx] and y [seeds, N, dy], the same arrays for the same arguments."""

    @lru_cache(maxsize=4)
    def draw(name, count, seeds):
        pairs = [KNOWN_TASKS[name].sample(count, np.random.default_rng(seed)) for seed in range(seeds)]
        return np.stack([x for x, _ in pairs]), np.stack([y for _, y in pairs])

    return draw
