"""A model whose layers accelerate fetches from a disk is calibrated as the same model in memory is."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import ib_analysis as ib
from ib_analysis.model.devices import input_device, is_dispatched, stored_parameters
from ib_analysis.model.fingerprint import weights_digest


@pytest.fixture
def offloaded(small_llama, tmp_path):
    pytest.importorskip("accelerate")
    small_llama.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"], "cpu")
    places["model.layers.1"] = "disk"
    folder = tmp_path / "weights"
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=folder).eval()


def test_a_model_in_memory_is_where_it_is(small_llama):
    assert input_device(small_llama) == torch.device("cpu") and not is_dispatched(small_llama)
    stored = list(stored_parameters(small_llama))
    assert len(stored) == len(list(small_llama.parameters()))
    assert all(mine is theirs for mine, theirs in zip(stored, small_llama.parameters()))


def test_what_is_put_aside_is_found(offloaded, small_llama):
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert input_device(offloaded) == torch.device("cpu") and is_dispatched(offloaded)
    assert weights_digest(offloaded) == weights_digest(small_llama)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*prompts calibrate")
def test_the_allocation_is_that_of_the_model_in_memory(offloaded, small_llama, small_prompts):
    found, expected = (ib.optimal_allocation(model, 1 / 2, prompts=small_prompts) for model in (offloaded, small_llama))
    assert found.plans == expected.plans
    assert found.in_sample_loss_bits == pytest.approx(expected.in_sample_loss_bits, rel=1e-4)
    inputs = {"input_ids": small_prompts[0][None], "do_sample": False, "max_new_tokens": 3}
    answers = [model.generate(**inputs, **ib.cache_argument(model, found.cache(model))) for model in (offloaded, small_llama)]
    assert torch.equal(*answers)
