"""What many tests share: the embedded model, and one small calibration of it."""

import warnings

import pytest
import torch

import ib_analysis as ib
from ib_analysis.episodes import make_episodes
from ib_analysis.optimize import prepare
from ib_analysis.tasks.mixture import mixture

LENGTH = 256
SMALLEST_SHARE = 1 / 16


@pytest.fixture(scope="session")
def embedded():
    """(model, tokenizer); no test may change them."""
    return ib.load()


@pytest.fixture(scope="session")
def bench(embedded, tmp_path_factory):
    """A calibration with 24 prompts of 256 tokens, for budgets from 1/16 up, saved as it grew."""
    model, tokenizer = embedded
    episodes = make_episodes(model, tokenizer, mixture("tests", 24, LENGTH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few prompts
        return prepare(model, episodes, SMALLEST_SHARE, profile_path=tmp_path_factory.mktemp("bench") / "profile.safetensors")


@pytest.fixture(autouse=True)
def seeded():
    """The same random tensors in every run."""
    torch.manual_seed(0)
