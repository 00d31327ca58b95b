"""The learned scorer: a weighted sum of signs, which are those of their definitions."""

import json

import pytest
import torch
from materialised import H_KV, PADDED, SCALING, B, T, left_padded

from ib_analysis.errors import CalibrationError
from ib_analysis.scorers import SCORERS, SnapKV, ValueAware, get_scorer, scorer_to_json
from ib_analysis.scorers.compactor import leverage, noncausal_attention
from ib_analysis.scorers.learned import SIGNS, Learned, token_signs

WEIGHTS = tuple(tuple(tuple(layer + head + sign / 8 for sign in range(len(SIGNS))) for head in range(H_KV)) for layer in range(2))


def module_of(layer):
    module = torch.nn.Module()
    module.layer_idx = layer
    return module


def test_signs_are_logarithms_less_their_mean():
    query, keys, values, valid = left_padded()
    found = token_signs(module_of(0), query, keys, values, valid, SCALING)
    assert found.shape == (B, H_KV, T, len(SIGNS))
    block = (module_of(0), query, keys, values, valid, SCALING)
    norm, position = values[0].norm(dim=-1), torch.arange(T).expand(H_KV, T)
    raw = {
        "value_aware": ValueAware()(*block)[0].log(),
        "value_aware, 8 queries": ValueAware(window=8)(*block)[0].log(),
        "attention": SnapKV()(*block)[0].log(),
        "non-causal attention": (noncausal_attention(query[0], keys[0], 256) * norm).log(),
        "key leverage": leverage(keys[0]).log(),
        "key leverage, without positions": leverage(keys[0]).log(),  # as nobody knows how this module rotates
        "value leverage": leverage(values[0]).log(),
        "value norm": norm.log(),
        "key norm": keys[0].norm(dim=-1).log(),
        "key difference": SCORERS["keydiff"](*block)[0],
        "distance to the end": (T - position).log(),
        "position": position / T,
    }
    assert list(raw) == list(SIGNS)
    expected = torch.stack([x - x.mean(-1, keepdim=True) for x in raw.values()], -1)
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)


def test_a_sequence_is_read_alone_and_padding_is_not():
    query, keys, values, valid = left_padded()
    found = token_signs(module_of(0), query, keys, values, valid, SCALING)
    q, k, v = (x[1:, :, PADDED:] for x in (query, keys, values))
    torch.testing.assert_close(found[1:, :, PADDED:], token_signs(module_of(0), q, k, v, valid[1:, PADDED:], SCALING))
    assert not found[1, :, :PADDED].any()


@pytest.mark.parametrize("layer", [0, 1])
def test_scores_are_each_head_s_weighted_sums(layer):
    query, keys, values, valid = left_padded(queries=5)
    signs = token_signs(module_of(layer), query, keys, values, valid, SCALING)
    expected = (signs * torch.tensor(WEIGHTS[layer])[:, None]).sum(-1)
    found = Learned(WEIGHTS)(module_of(layer), query, keys, values, valid, SCALING)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_without_weights_it_ranks_as_value_aware():
    query, keys, values, valid = left_padded()
    block = (module_of(0), query, keys, values, valid, SCALING)
    assert torch.equal(Learned()(*block), ValueAware()(*block))


def test_it_is_saved_with_its_weights():
    content = json.loads(json.dumps(scorer_to_json(Learned(WEIGHTS))))
    assert get_scorer(content) == Learned(WEIGHTS) != Learned()
    hash(get_scorer(content))


def test_another_model_s_weights_are_refused():
    query, keys, values, valid = left_padded()
    with pytest.raises(CalibrationError, match=r"weights for 0 KV heads of layer 2, which has 2: optimal_allocation fits"):
        Learned(WEIGHTS)(module_of(2), query, keys, values, valid, SCALING)
    for head in ((1.0, 2.0), (float("nan"),) * len(SIGNS)):
        with pytest.raises(CalibrationError, match=r"needs 12 finite weights a head, of value_aware, "):
            Learned(((head,),))
