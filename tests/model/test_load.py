"""Loading: the embedded model works offline, and what cannot be loaded says why."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from ib_analysis import load
from ib_analysis.errors import CorruptFileError, ModelNotFoundError, UnsupportedModelError
from ib_analysis.model.bundled import MODEL
from ib_analysis.model.load import check_model


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the embedded model, to be damaged."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


@pytest.fixture
def connections(monkeypatch) -> list[object]:
    """Every address that something tried to reach. All fail."""
    tried: list[object] = []

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tried


def test_embedded_model_needs_no_network(connections):
    model, tokenizer = load()
    text = "- amber violet\nFind amber"
    assert tokenizer.decode(tokenizer(text).input_ids[1:]) == text
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert not model.training
    assert not connections


def test_local_folders_need_no_network(connections, copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    for name in (copy, str(copy), "model", "./model"):
        load(name)
    with pytest.raises(ModelNotFoundError):
        load("./absent")
    assert not connections


def test_other_names_are_looked_up(connections, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's client waits and tries again
    with pytest.raises(ModelNotFoundError, match="no-such-owner/no-such-model"):
        load("no-such-owner/no-such-model")
    assert connections  # so the two tests above would have seen one


def test_embedded_model_is_a_plain_checkpoint():
    AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True)
    AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


def test_encoders_are_refused(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
    BertLMHeadModel(BertConfig(**size)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedModelError, match="bert model with an encoder"):
        load(tmp_path / "bert")
    T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)).save_pretrained(
        tmp_path / "t5"
    )
    with pytest.raises(UnsupportedModelError, match="t5 model"):
        load(tmp_path / "t5")


def test_folders_without_safetensors_are_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        load(tmp_path)
    shutil.copy(MODEL / "config.json", tmp_path)
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        load(tmp_path)


def test_pickles_are_never_read(copy, monkeypatch):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(ModelNotFoundError, match="other formats are not read"):
        load(copy)


def test_a_file_is_no_folder():
    with pytest.raises(ModelNotFoundError, match="is a file: pass the folder"):
        load(MODEL / "model.safetensors")


@pytest.mark.parametrize("kept_bytes", [0, 1000, -1])
def test_truncated_weights_are_refused(copy, kept_bytes):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept_bytes])
    with pytest.raises(CorruptFileError, match="get them again"):
        load(copy)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_cut_json_is_refused(copy, file):
    (copy / file).write_text((copy / file).read_text()[:100])
    with pytest.raises(CorruptFileError, match="was cut or edited"):
        load(copy)


@pytest.mark.parametrize(
    ("value", "message"), [({"hidden_act": "siluu"}, "describes no model"), ({"hidden_size": 10**9}, "but its weights are")]
)
def test_a_damaged_config_is_refused_before_memory_is_taken(copy, value, message):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | value))
    with pytest.raises(CorruptFileError, match=message):
        load(copy)


def test_absent_weights_are_not_made_up(copy):
    """transformers would go on with random numbers in their place."""
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptFileError, match=r"layers\.2\.mlp\.up_proj\.weight is absent"):
        load(copy)


def test_weights_of_another_shape_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(CorruptFileError, match="of another shape"):
        load(copy)


def test_a_missing_shard_is_named(copy):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    shards = {
        "model.embed_tokens.weight": "model-00001-of-00002.safetensors",
        "model.norm.weight": "model-00002-of-00002.safetensors",
    }
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    with pytest.raises(ModelNotFoundError, match="model-00002-of-00002"):
        load(copy)


@pytest.mark.parametrize("name", ["no/such/model", "no-such/model", "./no/such/model", "~/no/such/model"])
def test_missing_models_are_refused(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="such/model"):
        load(name)


def test_what_is_no_model_is_refused(small_llama):
    check_model(small_llama)
    with pytest.raises(UnsupportedModelError, match="Linear is no model of transformers"):
        check_model(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="compiled models are not supported"):
        check_model(torch.compile(small_llama))


def test_a_gguf_file_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("ib_analysis.model.load.find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r'gguf and accelerate: pip install "ib-analysis\[gguf\]"'):
        load(tmp_path / "model.gguf")


def test_what_is_no_gguf_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GIF89a")
    monkeypatch.setattr("ib_analysis.model.load.find_spec", lambda name: name)
    with pytest.raises(CorruptFileError, match="is no GGUF file"):
        load(tmp_path / "model.gguf")


def test_what_else_is_asked_for_goes_on_to_transformers():
    assert load()[0].config._attn_implementation == "sdpa"
    assert load(attn_implementation="eager")[0].config._attn_implementation == "eager"


def test_layers_on_a_disk(copy, tmp_path):
    pytest.importorskip("accelerate")
    model, _ = load(copy, device_map={"": "disk"}, offload_folder=tmp_path / "weights")
    assert model.device.type == "meta" and not model.training
