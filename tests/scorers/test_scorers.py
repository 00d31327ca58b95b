"""Every scorer, and how one is named, found and saved."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from ib_analysis.errors import UnknownNameError
from ib_analysis.scorers import SCORERS, SnapKV, ValueAware, get_scorer, scorer_name, scorer_to_json

B, H, H_KV, T, D = 2, 4, 2, 20, 8
SCALING = D**-0.5


@pytest.fixture
def block():
    """(module, query, keys, values, valid, scaling) of a prefill whose second sequence is padded on the left."""
    query, (keys, values) = torch.randn(B, H, T, D), torch.randn(2, B, H_KV, T, D)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, :5] = False
    config = LlamaConfig(hidden_size=H * D, num_attention_heads=H, num_key_value_heads=H_KV, num_hidden_layers=1)
    return LlamaAttention(config, 0), query, keys, values, valid, SCALING


@pytest.mark.parametrize("name", SCORERS)
def test_shape_and_finiteness(name, block):
    scores = SCORERS[name](*block)
    assert scores.shape == (B, H_KV, T) and scores.dtype == torch.float32
    assert torch.isfinite(scores[0]).all()
    assert torch.isfinite(scores[1, :, 5:]).all()


@pytest.mark.parametrize("name", SCORERS)
def test_names_and_scorers_are_found(name):
    assert get_scorer(name) is SCORERS[name]
    assert get_scorer(SCORERS[name]) is SCORERS[name]
    assert get_scorer({"name": name}) is SCORERS[name]
    assert scorer_to_json(SCORERS[name]) == name


def mine(module, query, keys, values, valid, scaling):
    return keys.norm(dim=-1)


@dataclass(frozen=True)
class Mine:
    power: int = 2

    def __call__(self, module, query, keys, values, valid, scaling):
        return keys.norm(dim=-1) ** self.power


OBJECTS = {"function": mine, "dataclass": Mine(), "SnapKV": SnapKV(window=16), "ValueAware": ValueAware(window=8)}


@pytest.mark.parametrize("scorer", OBJECTS.values(), ids=OBJECTS)
def test_a_scorer_itself_is_what_it_is(scorer):
    assert get_scorer(scorer) is scorer


@pytest.mark.parametrize("scorer", [SnapKV(window=16), SnapKV(kernel=3), SnapKV(8, 7), ValueAware(window=8)], ids=str)
def test_json_gives_a_scorer_with_other_fields_back(scorer):
    content = json.loads(json.dumps(scorer_to_json(scorer)))
    assert content["name"] in SCORERS and get_scorer(content) == scorer
    assert scorer != SCORERS[content["name"]]


def test_fields_as_registered_are_saved_as_the_name():
    assert scorer_to_json(SnapKV()) == "snapkv"
    assert scorer_to_json(ValueAware()) == "value_aware"


def test_a_scorer_of_ones_own_is_saved_once_it_is_registered(monkeypatch):
    monkeypatch.setitem(SCORERS, "mine", Mine())
    assert get_scorer("mine") == Mine() and scorer_to_json(Mine()) == "mine"
    other = replace(Mine(), power=3)
    assert get_scorer(json.loads(json.dumps(scorer_to_json(other)))) == other


@pytest.mark.parametrize("scorer", [mine, Mine()], ids=["function", "dataclass"])
def test_a_scorer_that_is_not_registered_cannot_be_saved(scorer):
    with pytest.raises(UnknownNameError, match=r"(?i)mine.* has no name to be saved under: add it to .*SCORERS\['mine'\] = "):
        scorer_to_json(scorer)


@pytest.mark.parametrize("given", ["snapKV", "", None, 3, {}, {"name": "snapKV"}, {"window": 16}, ["snapkv"]], ids=repr)
def test_other_things_are_refused_with_what_there_is(given):
    with pytest.raises(UnknownNameError, match=r"there is no scorer .*: use one of value_aware, snapkv, .*, or pass"):
        get_scorer(given)


@pytest.mark.parametrize("given", [SnapKV, Mine])
def test_a_class_is_no_scorer(given):
    """It could be called, and would only fail where its scores are read."""
    with pytest.raises(UnknownNameError, match=given.__name__):
        get_scorer(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "snapkv", "windows": 16}, "'snapkv' has no 'windows': its fields are window, kernel"),
        ({"name": "streaming_llm", "window": 16}, "'streaming_llm' has no 'window': its fields are none"),
    ],
)
def test_fields_that_a_scorer_has_not_are_refused(given, said):
    with pytest.raises(UnknownNameError, match=said):
        get_scorer(given)


def test_names_are_those_of_the_registry_whatever_the_fields():
    assert [scorer_name(scorer) for scorer in SCORERS.values()] == list(SCORERS)
    assert scorer_name(SnapKV(window=16)) == "snapkv"
    assert scorer_name(mine) == "mine" and scorer_name(Mine()) == "Mine(power=2)"


def test_scorers_are_values():
    """They are parts of specs that are compared and hashed."""
    assert SnapKV(window=16) == SnapKV(window=16) != SnapKV()
    assert len({SnapKV(window=16), SnapKV(window=16), SnapKV(), ValueAware()}) == 3
