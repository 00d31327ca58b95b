"""An allocation as a value: its file, its tables, the models that it fits."""

import copy
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from ib_analysis import Allocation, Profile
from ib_analysis.errors import CorruptFileError, ProfileMismatchError
from ib_analysis.files import sealed_json
from ib_analysis.measurement import Measurement
from ib_analysis.optimize import allocate, full_allocation
from ib_analysis.profile import model_fingerprint
from ib_analysis.shape import cache_shape
from ib_analysis.tasks.mixture import mixture


@pytest.fixture(scope="module")
def allocation(bench):
    return allocate(bench, 1 / 8)


@pytest.fixture
def full(small_llama):
    return full_allocation(small_llama, cache_shape(small_llama.config), "value_aware")


@pytest.fixture(scope="module")
def other_model():
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )


def test_json_round_trip(allocation, tmp_path):
    path = tmp_path / "allocation.json"
    assert Allocation.from_json(allocation.to_json(path)) == allocation == Allocation.from_json(path)
    marked = "\ufeff" + allocation.to_json()  # as editors on Windows begin a text
    (tmp_path / "marked.json").write_text(marked, encoding="utf-8")
    assert Allocation.from_json(marked) == allocation == Allocation.from_json(tmp_path / "marked.json")
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


def test_what_is_no_allocation(tmp_path):
    for empty in ("", "  \n"):
        with pytest.raises(CorruptFileError, match="the allocation is no complete JSON"):
            Allocation.from_json(empty)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        Allocation.from_json(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        Allocation.from_json(tmp_path / "none.json")
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CorruptFileError, match=r"binary\.json is no text"):
        Allocation.from_json(binary)


def test_json_with_other_fields(full):
    def sealed(**changes):
        content = {**json.loads(full.to_json()), **changes}
        return sealed_json({name: value for name, value in content.items() if name != "checksum" and value != "left out"})

    assert Allocation.from_json(sealed()) == full
    for changes in ({"more": 1}, {"dual_bound": "left out"}, {"pinned": {"sinks": 1}}, {"plans": 3}, {"shape": "left out"}):
        with pytest.raises(ProfileMismatchError, match="other fields"):
            Allocation.from_json(sealed(**changes))


def test_nan_in_json(full):
    measured = Measurement(1, 0.5, (math.nan, math.nan), 2.0, None, None)
    found = Allocation.from_json(replace(full, predicted_loss_bits=math.nan, dual_bound=-math.inf, validation=measured).to_json())
    assert math.isnan(found.predicted_loss_bits) and math.isnan(found.dual_bound)
    assert found.validation is not None and np.isnan(found.validation.loss_interval_bits).all()
    assert found.validation.accuracy is None
    assert math.isnan(found.model_error) and "loses 0.5000" in str(found)


def test_full_cache_in_words_and_figures(full, tmp_path):
    assert "nothing is compressed" in str(full) and "Empty" not in str(full)
    assert full.nbytes(100) == 100 * full.shape.bytes_per_token
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full.plot(tmp_path / "full")
    drawn = pd.read_csv(tmp_path / "full.csv")
    assert len(drawn) == 4
    assert (drawn.token_share == 1).all() and (drawn.key_bits == 16).all() and (drawn.value_bits == 16).all()


def test_a_config_that_computes_the_same_is_no_other_model(allocation, embedded):
    config = copy.deepcopy(embedded[0].config)
    config.pad_token_id = 5
    config.output_hidden_states = True
    assert model_fingerprint(config) == allocation.model


def test_another_model_is_refused(allocation, other_model):
    with pytest.raises(ProfileMismatchError, match="another model"):
        allocation.cache(other_model)
    with pytest.raises(ProfileMismatchError, match="another model"):
        allocation.validate(other_model, mixture("x", 3, 64))


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
    model, _ = embedded
    found = allocation.validate(model, mixture("others", 6, 256))
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
