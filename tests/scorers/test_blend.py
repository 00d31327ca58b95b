"""Blends of two scorers by rank."""

import json
from dataclasses import replace

import pytest
import torch

from ib_analysis.errors import UnknownNameError
from ib_analysis.scorers import SCORERS, SnapKV, get_scorer, scorer_to_json
from ib_analysis.scorers.blend import Blend


def by_key(module, query, keys, values, valid, scaling):
    return keys[..., 0]


def by_value(module, query, keys, values, valid, scaling):
    return values[..., 0]


def scores(blend, keys, values, padded=0):
    rows = [torch.tensor(x, dtype=torch.float32)[None, None, :, None] for x in (keys, values)]
    valid = (torch.arange(len(keys)) >= padded)[None]
    return blend(torch.nn.Module(), rows[0], *rows, valid, 1.0)[0, 0]


def test_places_are_averaged():
    found = scores(Blend(by_key, by_value, 0.25), [0.1, 30.0, -5.0], [7.0, -1.0, 0.0])
    assert found.tolist() == [0.75 * 1 + 0.25 * 2, 0.75 * 2 + 0.0, 0.0 + 0.25 * 1]


def test_padding_takes_no_place():
    found = scores(Blend(by_key, by_value), [99.0, 99.0, 1.0, 2.0], [99.0, 99.0, 1.0, 2.0], padded=2)
    assert found[2:].tolist() == [0.0, 1.0]


def test_a_blend_of_scorers_with_fields_is_saved_and_found():
    blend = Blend(SnapKV(window=8), SCORERS["knorm"], 0.25)
    content = json.loads(json.dumps(scorer_to_json(blend)))
    assert content["first"]["window"] == 8 and content["second"] == "knorm"
    assert get_scorer(content) == blend != replace(blend, first=SnapKV())


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_weight_is_a_share(share):
    with pytest.raises(UnknownNameError, match=r"the second scorer's weight is a share from 0 to 1"):
        Blend(second_weight=share)
