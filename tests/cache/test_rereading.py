"""A context that is read twice, for scorers that need it."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache

from ib_analysis.cache.attention import cache_argument, use_attention
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.generation import generate_text
from ib_analysis.cache.plan import HeadPlan, Recent, Tier
from ib_analysis.cache.rereading import CUE, SINKS, read, reread_scores
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.errors import UnknownNameError
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replay import Replay
from ib_analysis.scorers import SCORERS, RereadingScorer
from ib_analysis.scorers.blend import Blend
from ib_analysis.scorers.kvgrad import KVgrad
from ib_analysis.scorers.kvzip import KVzip
from tests.cache.test_compressed import small_model

TWICE = {name: scorer for name, scorer in SCORERS.items() if isinstance(scorer, RereadingScorer)}
QUARTER, RECENT = HeadPlan("kivi", (Tier(0.25, 8, 8),)), Recent(2, 8, 4)


def make_cache(model, scorer, plan=QUARTER):
    use_attention(model)
    spec = CacheSpec(cache_shape(model.config), RECENT, scorer)
    return CompressedCache(spec, spec.uniform(plan))


def ids_of(batch, tokens):
    return torch.randint(3, 64, (batch, tokens), generator=torch.Generator().manual_seed(1))


def attention_of_repetition(model, ids, chunk):
    """The weights [H, M, T + M] of every layer when the chunk is read again, from an eager model that returns them."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    cache = DynamicCache(config=model.config)
    model(ids, **cache_argument(model, cache))
    again = ids[:, max(0, chunk.start - CUE) : chunk.stop]
    return [weights[0] for weights in model(again, **cache_argument(model, cache), output_attentions=True).attentions]


@pytest.mark.parametrize("chunk", [64, 24])
@torch.no_grad()
def test_kvzip_is_the_largest_weight_in_the_repetition(small_llama, chunk):
    ids, length = ids_of(1, 60), 60
    cache = DynamicCache(config=small_llama.config)
    small_llama(ids, **cache_argument(small_llama, cache))
    found = reread_scores(small_llama, KVzip(chunk), ids, torch.ones_like(ids, dtype=torch.bool), cache.layers)
    edges = [*range(0, length, chunk), length]
    for begin, end in pairwise(edges):
        for layer, weights in enumerate(attention_of_repetition(small_llama, ids, slice(begin, end))):
            among = torch.zeros(length + weights.shape[1], dtype=torch.bool)
            among[: min(SINKS, begin)] = among[begin:end] = among[length:] = True
            shared = (weights * among) / (weights * among).sum(-1, keepdim=True)
            expected = shared[:, :, begin:end].reshape(2, -1, end - begin).amax(1)  # two heads share each KV head
            torch.testing.assert_close(found[layer][0, :, begin:end], expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_kvgrad_is_weight_times_value_times_gradient(small_llama):
    """The gradient by finite differences: of the last hidden states' squares, as a layer's output moves."""
    ids, layer, step = ids_of(1, 6), 1, 1e-2
    model = small_llama.double()
    cache = DynamicCache(config=model.config)
    model(ids, **cache_argument(model, cache))
    values = cache.layers[layer].values[0]
    found = reread_scores(model, KVgrad(), ids, torch.ones_like(ids, dtype=torch.bool), cache.layers)[layer][0]
    weights = attention_of_repetition(model, ids, slice(0, 6))[layer][:, :, :6]

    projection = model.model.layers[layer].self_attn.o_proj

    def objective(query, column, moved):
        def move(module, given, out):
            out[0, query, column] += moved

        states = []
        hooks = [
            projection.register_forward_hook(move),
            model.model.layers[-1].register_forward_hook(lambda module, given, out: states.append(out)),
        ]
        model(ids, **cache_argument(model, copy.deepcopy(cache)))
        for hook in hooks:
            hook.remove()
        return float(states[0].square().sum())

    slopes = [[(objective(q, c, step) - objective(q, c, -step)) / (2 * step) for c in range(32)] for q in range(6)]
    norms = torch.tensor(slopes).norm(dim=1)  # [M]
    projected = [values[h // 2] @ projection.weight[:, 8 * h : 8 * h + 8].T for h in range(4)]  # of query heads: [T, hidden]
    of_heads = torch.stack([(weights[h] * norms[:, None]).amax(0) * projected[h].norm(dim=1) for h in range(4)])
    torch.testing.assert_close(found.double(), of_heads.view(2, 2, 6).amax(1), rtol=1e-3, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("scorer", TWICE.values(), ids=TWICE)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@torch.no_grad()
def test_padding_and_the_batch_do_not_count(small_llama, scorer, kind):
    model = small_llama if kind == "llama" else small_model("gemma3_text")
    ids = ids_of(2, 60)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :13] = False
    cache = DynamicCache(config=model.config)
    read(model, ids, valid, cache)
    before = [layer.keys.clone() for layer in cache.layers]
    together = reread_scores(model, scorer, ids, valid, cache.layers)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before))
    for b, first in enumerate((0, 13)):
        single = DynamicCache(config=model.config)
        model(ids[b : b + 1, first:], **cache_argument(model, single))
        alone = reread_scores(model, scorer, ids[b : b + 1, first:], valid[b : b + 1, first:], single.layers)
        assert alone.keys() == together.keys() == {i for i, layer in enumerate(cache.layers) if not layer.is_sliding}
        for i in alone:
            torch.testing.assert_close(together[i][b, :, first:], alone[i][0], rtol=1e-3, atol=1e-5)
            assert (together[i][b, :, :first] == 0).all()


@pytest.mark.parametrize("scorer", TWICE.values(), ids=TWICE)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@torch.no_grad()
def test_a_filled_cache_predicts_what_the_replay_says(small_llama, small_prompts, scorer, kind):
    model = small_llama if kind == "llama" else small_model("gemma3_text")
    example = make_examples(model, None, small_prompts[:1])[0]
    spec = CacheSpec(cache_shape(model.config), RECENT, scorer)
    plans = spec.uniform(QUARTER)
    expected = Replay(model, spec, example).measure([plans])[0]
    use_attention(model)
    logits = []
    for cache in (DynamicCache(config=model.config), CompressedCache(spec, plans)):
        if isinstance(cache, CompressedCache):
            cache.fill(model, example.prefill[None])
        else:
            model(example.prefill[None], **cache_argument(model, cache))
        out = model(example.followup[None], **cache_argument(model, cache)).logits[0, example.predicting]
        logits.append(out.float().log_softmax(-1))
    found = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean() / torch.tensor(2.0).log()
    assert float(found) == pytest.approx(float(expected[0]), rel=0.02)
    by_value = Replay(model, replace(spec, scorer=SCORERS["value_aware"]), example).measure([plans])[0]
    assert abs(float(by_value[0]) / float(expected[0]) - 1) > 0.05  # other tokens were kept


@pytest.mark.parametrize("scorer", TWICE.values(), ids=TWICE)
def test_generation_goes_on_from_a_filled_cache(small_llama, scorer):
    """Also where nothing may be differentiated, and until tokens leave the windows."""
    ids, cache = ids_of(2, 40), make_cache(small_llama, scorer)
    with torch.inference_mode():
        cache.fill(small_llama, ids[:, :-1])
        out = small_llama.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            **cache_argument(small_llama, cache),
        )
    assert out.shape == (2, 70) and cache.get_seq_length() == 69
    assert cache.nbytes == 2 * cache.spec.nbytes(cache.plans, 69)


def test_the_command_line_fills_it(embedded, tmp_path):
    model, tokenizer = copy.deepcopy(embedded)
    cache = make_cache(model, KVzip(), HeadPlan("kivi", (Tier(1.0, 8, 8),)))
    text = "The farmer sold the red apple to the old sailor, and the sailor kept the apple in a box near the river. "
    assert generate_text(model, tokenizer, text, 4, cache) == generate_text(model, tokenizer, text, 4)
    cache.save(tmp_path / "cache.safetensors", model)
    loaded = CompressedCache.load(tmp_path / "cache.safetensors", model)
    assert loaded.spec.scorer == KVzip() and loaded.nbytes == cache.nbytes


def test_a_forward_pass_alone_is_refused_and_leaves_the_cache_empty(small_llama):
    ids, cache = ids_of(1, 40), make_cache(small_llama, KVzip())
    with pytest.raises(ValueError, match=r"'kvzip' the model reads the context twice: call cache\.fill"):
        small_llama(ids, **cache_argument(small_llama, cache))
    assert cache.get_seq_length() == 0
    cache.fill(small_llama, ids)
    with pytest.raises(ValueError, match="holds 40 tokens already"):
        cache.fill(small_llama, ids)


def test_what_is_not_compressed_needs_no_second_reading(small_llama):
    use_attention(small_llama)
    spec = CacheSpec(cache_shape(small_llama.config), RECENT, KVzip())
    cache = CompressedCache(spec, spec.full_plans)
    small_llama(ids_of(1, 40), **cache_argument(small_llama, cache))
    assert cache.get_seq_length() == 40


def test_layers_at_full_precision_hold_what_a_dynamic_cache_holds(small_llama):
    use_attention(small_llama)
    spec, ids = CacheSpec(cache_shape(small_llama.config), RECENT, KVzip()), ids_of(1, 40)
    cache, full = CompressedCache(spec, (None, (QUARTER, QUARTER))), DynamicCache(config=small_llama.config)
    cache.fill(small_llama, ids)
    small_llama(ids, **cache_argument(small_llama, full))
    torch.testing.assert_close(cache.layers[0].keys, full.layers[0].keys)
    assert cache.layers[1].get_seq_length() == 40 and not cache.is_broken


def test_other_scorers_are_filled_as_by_a_forward_pass(small_llama):
    ids, mask = ids_of(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :5] = 0
    filled, read_in = (make_cache(small_llama, SCORERS["value_aware"]) for _ in range(2))
    filled.fill(small_llama, ids, mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    small_llama(ids, attention_mask=mask, position_ids=positions, **cache_argument(small_llama, read_in))
    for found, expected in zip(filled.layers, read_in.layers):
        assert all(torch.equal(a, b) for a, b in zip(found.tensors(), expected.tensors()))


def test_an_interrupt_leaves_the_cache_empty(small_llama, monkeypatch):
    ids, cache = ids_of(1, 40), make_cache(small_llama, KVgrad())

    def interrupt(self, seen):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KVgrad, "reread", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.fill(small_llama, ids)
    assert cache.get_seq_length() == 0
    assert not any(module._forward_hooks for module in small_llama.modules())
    cache.fill(small_llama, ids)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize(
    ("ids", "mask", "told"),
    [
        (ids_of(1, 40)[0], None, "sequences, tokens"),
        (ids_of(1, 40)[:, :0], None, "not empty"),
        (ids_of(1, 40), torch.ones(1, 39), "shape"),
        (ids_of(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), "sequence 1 has padding"),
        (ids_of(2, 4), torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1]]), "sequence 0 has padding"),
        (ids_of(1, 4), torch.zeros(1, 4), "sequence 0 has padding"),
    ],
)
def test_other_inputs_are_refused(small_llama, ids, mask, told):
    with pytest.raises(ValueError, match=told):
        make_cache(small_llama, KVzip()).fill(small_llama, ids, mask)


def test_a_blend_takes_no_scorer_that_reads_twice():
    with pytest.raises(UnknownNameError, match="reads the context once"):
        Blend(second=KVzip())
