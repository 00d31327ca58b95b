"""The tokens that kvpress 0.5.5 keeps, on tensors that kvpress_reference.py stored."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from ib_analysis.scorers import SCORERS, SnapKV
from ib_analysis.scorers.compactor import Compactor, leverage, noncausal_attention
from ib_analysis.scorers.criticalkv import CriticalKV
from ib_analysis.scorers.kvgrad import KVgrad
from ib_analysis.scorers.kvzip import KVzip
from ib_analysis.scorers.repetition import Repetition

STORED = load_file(Path(__file__).with_name("kvpress.safetensors"))
TOKENS, DIM = 96, 16
SCALING = DIM**-0.5
CONFIG = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=DIM)

# Our scorer, the press, and the tokens between those that either keeps in any case.
SAME = {
    "knorm": (SCORERS["knorm"], "knorm", slice(0, TOKENS)),
    "keydiff": (SCORERS["keydiff"], "keydiff", slice(0, TOKENS)),
    "tova": (SCORERS["tova"], "tova", slice(0, TOKENS - 1)),
    "snapkv": (SnapKV(window=8), "snapkv", slice(0, TOKENS - 8)),
    "expected_attention": (SCORERS["expected_attention"], "expected_attention", slice(4, TOKENS)),
    "compactor": (Compactor(leverage_weight=0.35, chunk=42), "compactor_exact", slice(8, TOKENS - 4)),
    "h2o": (SCORERS["h2o"], "observed_attention", slice(0, TOKENS)),
}


def stored(layer, *names):
    return [STORED[f"layer{layer}.{name}"] for name in names]


def module_of(layer):
    module = torch.nn.Module()
    module.config = CONFIG
    module.o_proj = torch.nn.Linear(64, 64, bias=False)
    module.o_proj.weight.data = STORED[f"layer{layer}.o_proj"]
    return module


def ours(scorer, layer):
    query, keys, values = (x[None] for x in stored(layer, "query", "keys", "values"))
    return scorer(module_of(layer), query, keys, values, torch.ones(1, TOKENS, dtype=torch.bool), SCALING)[0]


def assert_same_kept(found, expected):
    """At every budget but where two tokens of the reference tie within rounding."""
    order = expected.sort(descending=True)
    for head in range(len(found)):
        values = order.values[head]
        for count in range(1, len(values)):
            if values[count - 1] - values[count] > 1e-5 * values.abs().max():
                kept = set(found[head].topk(count).indices.tolist())
                assert kept == set(order.indices[head, :count].tolist()), f"head {head}, {count} tokens"


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("scorer", "press", "compared"), SAME.values(), ids=SAME)
def test_the_same_tokens_are_kept(scorer, press, compared, layer):
    (reference,) = stored(layer, f"score.{press}")
    assert_same_kept(ours(scorer, layer)[:, compared], reference[:, compared])


@pytest.mark.parametrize("layer", [0, 1])
def test_streaming_llm_keeps_the_same_recent_tokens(layer):
    (reference,) = stored(layer, "score.streaming_llm")
    kept = int(reference[0, 4:].sum())  # beside the four sinks
    assert_kept = ours(SCORERS["streaming_llm"], layer)[:, 4:].topk(kept).indices.sort().values
    assert torch.equal(assert_kept, reference[:, 4:].nonzero()[:, 1].reshape(2, kept))


@pytest.mark.parametrize("layer", [0, 1])
def test_criticalkv_ranks_what_its_first_stage_leaves_alike(layer):
    (reference,) = stored(layer, "score.criticalkv")
    found = ours(CriticalKV(SnapKV(window=8)), layer)
    for head in range(2):
        left = reference[head] < 1e30
        assert_same_kept(found[head : head + 1, left], reference[head : head + 1, left])


@pytest.mark.parametrize("layer", [0, 1])
def test_the_parts_of_compactor_keep_the_same_tokens(layer):
    query, keys, values, unrotated, levered, attended = stored(
        layer, "query", "keys", "values", "keys_unrotated", "score.leverage_exact", "score.non_causal"
    )
    assert_same_kept(leverage(unrotated), levered)
    weights = noncausal_attention(query, keys, 32) * values.norm(dim=-1)
    assert_same_kept(torch.nn.functional.avg_pool1d(weights, 3, stride=1, padding=1), attended)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("begin", [0, 64])
@pytest.mark.parametrize(("scorer", "press"), [(KVzip(), "kvzip"), (KVgrad(), "kvgrad")], ids=["kvzip", "kvgrad"])
def test_what_is_read_twice_is_ranked_as_by_kvpress(scorer, press, begin, layer):
    """Chunks of 64 tokens, of a context of 96."""
    query, keys, values, expected = stored(layer, *(f"{press}{begin}.{name}" for name in ("query", "keys", "values", "score")))
    gradient = STORED.get(f"layer{layer}.{press}{begin}.gradient")
    found = scorer.reread(Repetition(module_of(layer), query, keys, values, SCALING, gradient))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert_same_kept(found, expected)
