import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from ib_analysis.cache.key_bases import KeyBases
from ib_analysis.cache.plan import Recent
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.shape import CacheShape, LayerShape, cache_shape
from ib_analysis.scorers import SCORERS


def bases(seed=0):
    generator = torch.Generator().manual_seed(seed)
    first, last = torch.randn(2, 3, 8, 8, generator=generator).half()
    return KeyBases((first, None, last))


def test_the_way_back_is_the_inverse():
    found = bases().of_layer(2)
    assert found.into.dtype == found.back.dtype == torch.float32
    torch.testing.assert_close(found.into @ found.back, torch.eye(8).expand(3, 8, 8), atol=1e-3, rtol=0)
    assert bases().of_layer(1) is None


def test_heads_of_several_layers():
    all_of = bases()
    found = all_of.of([(2, 1), (0, 0), (2, 1)])
    assert torch.equal(found.into[1], all_of.layers[0][0].float()) and torch.equal(found.into[2], all_of.layers[2][1].float())
    assert torch.equal(found.back[0], all_of.of_layer(2).back[1])


def test_bytes_are_both_matrices_of_every_head():
    assert bases().nbytes == 2 * 6 * 64 * 4


def test_some_layers_alone():
    assert bases().only([2, 1]) == KeyBases((None, None, bases().layers[2]))
    assert bases().only([1]) is None


def test_json_round_trip_within_a_spec():
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=3, num_hidden_layers=3, vocab_size=8)
    spec = CacheSpec(cache_shape(config), Recent(1, 2, 1), SCORERS["value_aware"])
    assert CacheSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    based = replace(spec, bases=bases())
    assert CacheSpec.from_json(json.loads(json.dumps(based.to_json()))) == based != spec
    assert based != replace(spec, bases=bases(seed=1)) and hash(based) == hash(replace(spec, bases=bases()))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [("AAAA", "multiple of element size"), ("?", "base64"), ("AAAA" * 128, "cannot be inverted"), ("AAAA" * 64, "reshape")],
    ids=["cut", "no base 64", "zeros", "few"],
)
def test_what_is_no_basis_is_refused(numbers, message):
    content = bases().to_json()
    content[0] = {"fp16": numbers}
    with pytest.raises(ValueError, match=message):
        KeyBases.from_json(content, CacheShape((LayerShape(3, 8),) * 3))
