"""What many tests share: the embedded model, and one small calibration of it.

Large modules are imported where they are used: the process that hands tests to others loads this file, and needs none of them.
"""

import warnings
from copy import deepcopy
from dataclasses import replace

import pytest

LENGTH = 256
SMALLEST_SHARE = 1 / 16


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist's --no-loadscope-reorder, which versions before 3.7 do not know


def pytest_collection_modifyitems(items):
    """From the whole to its parts: files that take long come first, and no process is left alone with one at the end."""
    items.sort(key=lambda item: item.path, reverse=True)


@pytest.fixture(scope="session")
def embedded():
    """(model, tokenizer); no test may change them."""
    import ib_analysis as ib

    return ib.load()


@pytest.fixture(scope="module")
def bench(calibrated_bench):
    """Measured anew in each file, so that no test depends on what others measured before it."""
    return replace(calibrated_bench, profile=deepcopy(calibrated_bench.profile))


@pytest.fixture(scope="session")
def calibrated_bench(embedded, tmp_path_factory):
    """A calibration with 24 prompts of 256 tokens, for budgets from 1/16 up, saved as it grew."""
    from ib_analysis.replay.examples import make_examples
    from ib_analysis.search.optimize import prepare
    from ib_analysis.tasks.mixture import mixture

    model, tokenizer = embedded
    examples = make_examples(model, tokenizer, mixture("tests", 24, LENGTH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few prompts
        return prepare(model, examples, SMALLEST_SHARE, profile_path=tmp_path_factory.mktemp("bench") / "profile.safetensors")


@pytest.fixture
def small_llama():
    """A random Llama of two layers with two KV heads each, whose attention is far from uniform."""
    return random_llama()


@pytest.fixture(scope="session")
def shared_llama():
    """The same, made once; no test may change it."""
    return random_llama()


def random_llama():
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def small_prompts():
    """Six prompts of 128 random token ids."""
    import torch

    return list(torch.randint(3, 64, (6, 128), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(autouse=True)
def seeded():
    """The same random tensors in every run."""
    import torch

    torch.manual_seed(0)
