"""Loading: the embedded model works offline, and what cannot be loaded says why."""

import socket

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from ib_analysis import load
from ib_analysis.errors import CorruptFileError, ModelNotFoundError, UnsupportedModelError
from ib_analysis.models import EMBEDDED


def test_embedded_model_needs_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("network used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, tokenizer = load()
    text = "- amber violet\nFind amber"
    assert tokenizer.decode(tokenizer(text).input_ids[1:]) == text
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_embedded_model_is_a_plain_checkpoint():
    AutoModelForCausalLM.from_pretrained(EMBEDDED, local_files_only=True)
    AutoTokenizer.from_pretrained(EMBEDDED, local_files_only=True)


def test_encoder_is_refused(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
    BertModel(BertConfig(**size)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="encoder"):
        load(tmp_path)


def test_folders_without_safetensors_are_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text((EMBEDDED / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        load(tmp_path)


def test_truncated_weights_are_refused(tmp_path):
    for file in EMBEDDED.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CorruptFileError):
        load(tmp_path)


def test_missing_local_path_is_refused():
    with pytest.raises(ModelNotFoundError):
        load("./no/such/model")


def test_missing_hub_name_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="no/such/model"):
        load("no/such/model")
