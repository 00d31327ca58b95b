"""The measurements behind the model card, each against a slower or an independent way to get the same number."""

import math
import random

import corpus
import evaluate
import numpy as np
import pytest
import torch
from evaluate import (
    ANSWERED,
    FAR_TOKENS,
    LENGTHS_TOKENS,
    NEAR_TOKENS,
    Score,
    answer_line,
    attention_of_last_token,
    batches,
    depth_section,
    encode,
    evictions,
    model_bits,
    next_token,
    prompts_of,
    read_without,
    scores,
    text_section,
    training_texts,
    wilson,
    without,
)
from scipy.stats import binomtest
from transformers import DynamicCache

from ib_analysis.cache.attention import cache_argument
from ib_analysis.tasks import TASKS, Prompt

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("task", ANSWERED)
@pytest.mark.parametrize("length", LENGTHS_TOKENS)
def test_prompts_fit_into_the_length(embedded, task, length):
    lengths = [len(encode(prompt, embedded[1])[0]) for prompt in prompts_of(task, length, 20)]
    assert 0.9 * length - 10 < max(lengths) <= length


def test_answers_are_where_encode_says(embedded):
    _, tokenizer = embedded
    prompt = prompts_of("needles", 256, 1)[0]
    ids, answers = encode(prompt, tokenizer)
    assert [tokenizer.decode([ids[place] for place in answer]) for answer in answers] == [answer for _, answer in prompt.turns]


def test_padding_changes_no_prediction(embedded):
    model, tokenizer = embedded
    rows = [encode(prompts_of("retrieval", length, 1)[0], tokenizer)[0] for length in (128, 512, 256)]
    (together,) = batches(rows, model.config.pad_token_id)
    assert together.shape == (3, max(map(len, rows)))
    with torch.inference_mode():
        logits = model(together).logits
        for row, found in zip(rows, logits):
            alone = model(torch.tensor([row])).logits[0]
            torch.testing.assert_close(found[: len(row)], alone, atol=1e-3, rtol=1e-3)


def test_score_is_what_greedy_decoding_gives(embedded):
    model, tokenizer = embedded
    prompts = prompts_of("copying", 128, 6)
    for prompt, score in zip(prompts, scores(model, tokenizer, prompts)):
        inputs = tokenizer(prompt.context + prompt.question, return_tensors="pt")
        answer = tokenizer(prompt.answer, add_special_tokens=False).input_ids
        said = model.generate(**inputs, max_new_tokens=len(answer), do_sample=False)[0, inputs.input_ids.shape[1] :].tolist()
        assert score.first_right == (said[0] == answer[0])
        assert score.whole_right == (said == answer)


def test_a_share_of_right_answers_is_counted(embedded):
    """A model that always says one token is right exactly where that token is."""
    model, tokenizer = embedded
    prompts = prompts_of("needles", 128, 3)
    line_end = tokenizer("\n", add_special_tokens=False).input_ids[0]

    class Parrot:
        config = model.config

        def __call__(self, ids, use_cache):
            return type("Output", (), {"logits": torch.eye(len(tokenizer))[line_end].expand(*ids.shape, -1)})

    for score in scores(Parrot(), tokenizer, prompts):
        assert (score.first_right, score.whole_right, score.tokens_right) == (0, 0, 0.5)


@pytest.mark.parametrize(("right", "count"), [(0, 20), (7, 20), (20, 20), (193, 200)])
def test_wilson_interval(right, count):
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_the_answer_line_is_the_line_asked_for(embedded):
    _, tokenizer = embedded
    for prompt in prompts_of("retrieval", 256, 10):
        context = tokenizer(prompt.context).input_ids
        line = tokenizer.decode([context[place] for place in answer_line(prompt, tokenizer)])
        assert line == f"- {prompt.question.split()[1]}{prompt.answer}"


def read(model, ids: list[int]) -> DynamicCache:
    cache = DynamicCache()
    model(torch.tensor([ids]), **cache_argument(model, cache))
    return cache


def test_without_drops_these_tokens_from_every_layer_and_no_others(embedded):
    model, tokenizer = embedded
    with torch.inference_mode():
        cache = read(model, tokenizer(prompts_of("retrieval", 128, 1)[0].context).input_ids)
        smaller = without(cache, [3, 4, 9])
    tokens = cache.get_seq_length()
    keep = [place for place in range(tokens) if place not in (3, 4, 9)]
    assert smaller.get_seq_length() == tokens - 3
    assert len(smaller.layers) == model.config.num_hidden_layers
    for before, after in zip(cache.layers, smaller.layers):
        assert torch.equal(after.keys, before.keys[:, :, keep])
        assert torch.equal(after.values, before.values[:, :, keep])


def test_eviction_equals_hiding_the_tokens_from_the_question(embedded):
    """The logits behind an evicted cache are those of one pass whose mask hides the tokens from the question alone."""
    model, tokenizer = embedded
    prompt = prompts_of("retrieval", 256, 1)[0]
    context = tokenizer(prompt.context).input_ids
    asked = tokenizer(prompt.question, add_special_tokens=False).input_ids
    line = answer_line(prompt, tokenizer)
    hidden = range(line.start, line.stop + 12)
    total = len(context) + len(asked)
    mask = torch.full((total, total), -math.inf).triu(1)
    mask[len(context) :, hidden] = -math.inf
    positions = torch.arange(len(context), total)[None]
    with torch.inference_mode():
        expected = model(torch.tensor([context + asked]), attention_mask=mask[None, None]).logits[0, -1]
        smaller = without(read(model, context), hidden)
        found = model(torch.tensor([asked]), **cache_argument(model, smaller), position_ids=positions).logits[0, -1]
        whole = model(torch.tensor([context + asked])).logits[0, -1]
        guess = next_token(model, without(read(model, context), hidden), asked, len(context))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert (found - whole).abs().max() > 0.1  # hiding matters, so the comparison above can fail
    assert guess == expected.argmax()


@pytest.mark.parametrize("line", [range(1, 5), range(200, 204), range(497, 501)])
def test_evictions_are_around_the_line_or_away_from_it(line):
    found = list(evictions(line, 501, random.Random(0)).values())
    nothing, alone, near, far, elsewhere, behind, but_last = map(set, found)
    assert not nothing
    assert alone == set(line) and alone <= near <= far <= behind
    assert max(near) == min(line.stop + NEAR_TOKENS, 501) - 1 and max(far) == min(line.stop + FAR_TOKENS, 501) - 1
    assert behind == set(range(line.start, 501))
    assert len(elsewhere) == len(far) and not elsewhere & far
    assert but_last == set(range(1, 501 - NEAR_TOKENS))
    assert all(0 not in positions and max(positions, default=0) <= 500 for positions in found)


def test_attention_of_the_last_token(embedded):
    model, tokenizer = embedded
    prompts, before = prompts_of("retrieval", 128, 2), model.config._attn_implementation
    entropies_bits, shares = attention_of_last_token(model, tokenizer, prompts)
    shape = model.config.num_hidden_layers, model.config.num_attention_heads
    assert entropies_bits.shape == shares.shape == shape
    assert entropies_bits.min() >= 0 and entropies_bits.max() <= math.log2(128)
    assert shares.min() >= 0 and shares.max() <= 1
    assert model.config._attn_implementation == before

    layer = model.model.layers[0].self_attn  # the first layer's second head by hand
    ids = tokenizer(prompts[0].context + prompts[0].question, return_tensors="pt").input_ids
    with torch.inference_mode():
        states = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
        cos, sin = model.model.rotary_emb(states, torch.arange(ids.shape[1])[None])
        query, keys = (
            rotated(part(states).view(-1, heads, 64), cos, sin) for part, heads in ((layer.q_proj, 4), (layer.k_proj, 2))
        )
        weights = torch.softmax(keys[:, 0] @ query[-1, 1] / 8, 0).double()
    by_hand = -torch.special.xlogy(weights, weights).sum() / math.log(2)
    found, _ = attention_of_last_token(model, tokenizer, prompts[:1])
    assert found[0, 1] == pytest.approx(float(by_hand), abs=1e-3)


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [T, heads, D]."""
    first, second = states.chunk(2, -1)
    return states * cos[0, :, None] + torch.cat((-second, first), -1) * sin[0, :, None]


@pytest.mark.parametrize("tokens", [0, 1, 511, 512, 513, 1023, 1024, 1025, 1536, 1537, 2600])
def test_every_token_counts_once_with_context(tokens):
    """A model whose loss at each place, in nats, is ten more than the number of tokens it has read in that window."""

    class Reader:
        config = type("Config", (), {"pad_token_id": 0})

        def __call__(self, ids, use_cache):
            assert ids.shape[1] <= 1024
            logits = torch.zeros(*ids.shape, 4)
            logits[..., 0] = 10 + torch.arange(1, ids.shape[1] + 1)
            return type("Output", (), {"logits": logits})

    found = model_bits(Reader(), [[3] * tokens, [3, 3]], begin_token=1)
    expected = [place + 1 if place < 1024 else 513 + place % 512 for place in range(tokens)] + [1, 2]
    np.testing.assert_allclose(found * math.log(2) - 10, expected, atol=1e-3)


def test_bits_of_a_short_text_are_those_of_one_pass(embedded):
    model, tokenizer = embedded
    ids = tokenizer(
        "def read(path):\n    with open(path) as file:\n        return file.read()\n", add_special_tokens=False
    ).input_ids
    with torch.inference_mode():
        logits = model(torch.tensor([[1, *ids]])).logits[0, :-1].double()
    expected = -torch.log_softmax(logits, -1)[range(len(ids)), ids] / math.log(2)
    np.testing.assert_allclose(model_bits(model, [ids], 1), expected.numpy(), atol=1e-3)


def test_depth_table_counts_the_last_line_apart():
    pairs = "- a b\n- c d\n"
    early = Score(Prompt("retrieval", pairs, (("Find a", " b\n"),), depth_share=0.25), 1, 1, 1)
    late = Score(Prompt("retrieval", pairs + "The end.\n", (("Find c", " d\n"),), depth_share=0.9), 1, 1, 1)
    last = Score(Prompt("retrieval", pairs, (("Find c", " d\n"),), depth_share=0.9), 0, 0, 0)
    text = depth_section({("retrieval", length): [early, late, last, last] for length in LENGTHS_TOKENS})
    assert "| 512 | none | 1.000 of 1 | none | none | 1.000 of 1 | 0.000 of 2 |\n" in text


def test_another_standard_library_leaves_the_ngrams_out(embedded, monkeypatch):
    monkeypatch.setattr(corpus, "split", lambda: (["training"], ["another held-out text"]))
    assert training_texts() is None
    monkeypatch.setattr(evaluate, "held_out_texts", lambda: ["def read(path):\n    return path\n"])
    text = text_section(*embedded)
    assert "No n-gram models" in text and "Kneser-Ney" not in text and "this model" in text
    monkeypatch.setattr(corpus, "split", lambda: (["def write(path):\n    pass\n"], evaluate.held_out_texts()))
    text = text_section(*embedded)
    assert "No n-gram models" not in text and "Kneser-Ney 5-gram" in text and "unigram" in text


def test_figures_of_another_model_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", str(tmp_path), "--write"])
    with pytest.raises(SystemExit):
        evaluate.main()


def test_tokens_that_leave_at_once_are_seen_by_no_later_token(embedded):
    """The cache behind them is that of a pass whose mask hides them from all that follows."""
    model, tokenizer = embedded
    ids = tokenizer(TASKS["retrieval"](random.Random(1), 120).context).input_ids
    gone = range(20, 26)
    with torch.inference_mode():
        cache = read_without(model, ids, gone)
        hidden = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        hidden[gone.stop :, list(gone)] = False
        whole = DynamicCache()
        mask = torch.zeros(1, 1, len(ids), len(ids)).masked_fill(~hidden, torch.finfo(torch.float32).min)
        model(torch.tensor([ids]), attention_mask=mask, **cache_argument(model, whole))
    kept = [i for i in range(len(ids)) if i not in gone]
    assert cache.get_seq_length() == len(kept)
    for layer, expected in zip(cache.layers, whole.layers):
        torch.testing.assert_close(layer.keys, expected.keys[:, :, kept], atol=1e-4, rtol=1e-4)
