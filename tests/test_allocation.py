"""An allocation as a value: its file, its tables, the models that it fits."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from ib_analysis import Allocation, Profile
from ib_analysis.errors import CorruptFileError, ProfileMismatchError
from ib_analysis.optimize import allocate
from ib_analysis.tasks.mixture import mixture


@pytest.fixture(scope="module")
def allocation(bench):
    return allocate(bench, 1 / 8)


@pytest.fixture(scope="module")
def other_model():
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )


def test_json_round_trip(allocation, tmp_path):
    path = tmp_path / "allocation.json"
    assert Allocation.from_json(allocation.to_json(path)) == allocation == Allocation.from_json(path)
    assert json.loads(path.read_text())["schema"] == 1


def test_truncated_and_edited_json(allocation, tmp_path):
    text = allocation.to_json()
    edited = text.replace('"key_bits": 4', '"key_bits": 8', 1)
    assert edited != text
    for broken in (text[: len(text) // 2], edited, text.replace('"schema": 1', '"schema": 2')):
        with pytest.raises(CorruptFileError):
            Allocation.from_json(broken)
        path = tmp_path / "broken.json"
        path.write_text(broken)
        with pytest.raises(CorruptFileError, match=r"broken\.json"):
            Allocation.from_json(path)


def test_another_model_is_refused(allocation, bench, other_model):
    with pytest.raises(ProfileMismatchError, match="another model"):
        allocation.cache(other_model)
    with pytest.raises(ProfileMismatchError, match="another model"):
        allocation.validate(other_model, mixture("x", 3, 64))
    with pytest.raises(ProfileMismatchError, match="another model"):
        bench.profile.check_model(other_model.config)


def test_profile_round_trip(bench, tmp_path):
    path = tmp_path / "profile.safetensors"
    bench.profile.save(path)
    found = Profile.load(path)
    assert (found.loss_bits == bench.profile.loss_bits).all() and (found.measured == bench.profile.measured).all()
    assert found.options == bench.profile.options and found.pinned == bench.profile.pinned
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFileError, match=r"profile\.safetensors"):
        Profile.load(path)


def test_table_has_every_head_and_its_bytes(allocation):
    table = allocation.table()
    assert set(zip(table.layer, table["head"])) == set(allocation.shape.heads)
    heads = table.groupby(["layer", "head"]).head_bytes.first().sum()
    pinned = sum(allocation.pinned.nbytes(allocation.context_length, layer) for layer in allocation.shape.layers)
    assert heads + pinned == allocation.nbytes(allocation.context_length)


def test_validate_measures_other_prompts(allocation, embedded):
    model, tokenizer = embedded
    found = allocation.validate(model, mixture("others", 6, 256), tokenizer=tokenizer)
    assert found.plans == allocation.plans
    assert found.validation.prompts == 6
    assert found.validation != allocation.validation
    assert found.retained_bits == pytest.approx(found.validation.information_bits - found.validation.loss_bits)
    assert 0 < found.retained_share <= 1


def test_text_and_figure(allocation, tmp_path):
    assert "solver gap" in str(allocation) and "sinks" in str(allocation)
    allocation.plot(tmp_path / "heads")
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"heads.pdf", "heads.png", "heads.csv"}
    allocation.plot(tmp_path / "heads")
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
