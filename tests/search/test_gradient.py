"""Losses by the gradient: prices are those of float64 replays, and small losses are predicted as they are measured."""

import copy
from random import Random

import numpy as np
import pytest
import torch
from ib_kernels import FORMATS, Format, MetadataRows
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, LlamaConfig

from ib_analysis.cache.key_bases import KeyBases
from ib_analysis.cache.plan import EVICTED, HeadPlan, Recent, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.errors import UnsupportedModelError
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replay import Replay
from ib_analysis.scorers import SCORERS
from ib_analysis.search.candidates import head_options
from ib_analysis.search.gradient import gradient_losses, score_gradients
from ib_analysis.search.output_changes import RUN_SHARES
from ib_analysis.tasks import TASKS

pytestmark = pytest.mark.slow

OPTIONS = head_options(tuple(FORMATS))
RECENT = Recent(3, 6, 2)


def spec_of(model):
    shape = cache_shape(model.config)
    generator = torch.Generator().manual_seed(0)
    sizes = [(layer.kv_heads, layer.head_dim, layer.head_dim) for layer in shape.layers]
    turns = [torch.linalg.qr(torch.randn(size, generator=generator))[0] for size in sizes]
    bases = KeyBases(tuple((turn * torch.logspace(0, -1, turn.shape[-1])).half() for turn in turns))
    return CacheSpec(shape, RECENT, SCORERS["value_aware"], bases)


def replay_of(embedded, task, number=0):
    model, tokenizer = embedded
    example = make_examples(model, tokenizer, [TASKS[task](Random(f"{task} {number}"), 256)])[0]
    return Replay(model, spec_of(model), example)


def exactly(share):
    """Every precision of the tier whose codes are made for the very run that it is."""
    return [option for option in OPTIONS if len(option.tiers) == 1 and option.kept_share == share]


@pytest.mark.parametrize("share", RUN_SHARES)
def test_prices_are_those_of_float64_replays(embedded, share):
    check_prices(replay_of(embedded, "text"), exactly(share))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", RUN_SHARES)
def test_prices_of_random_models_are_those_of_float64_replays(random_model, seed, share):
    check_prices(random_model(seed), exactly(share))


def test_prices_between_the_runs_are_nearly_those(embedded):
    """The codes of a tier are those of a run up to four times as long: other rounding errors, as large as its own."""
    replays = [replay_of(embedded, task, number) for number in range(4) for task in ("text", "needles")]
    options = [option for option in OPTIONS if option.tiers and option.kept_share not in RUN_SHARES]
    found, expected = (sum(of(replay, options) for replay in replays) for of in (prices, reference_prices))
    ratio = np.log2(found.sum(0) / expected.sum(0))
    assert abs(np.median(ratio)) < 0.1
    assert np.abs(ratio).max() < 2


def test_prices_of_a_format_that_fits_values_to_their_run(embedded, monkeypatch):
    monkeypatch.setitem(FORMATS, "shared", Format("shared", FORMATS["rotated"].keys, SharedRange()))
    check_prices(replay_of(embedded, "text"), [HeadPlan("shared", (Tier(1 / 4, 4, 4),))])


def test_long_contexts_are_read_in_blocks(embedded, monkeypatch):
    replay = replay_of(embedded, "text")
    whole = prices(replay, OPTIONS[::20])
    monkeypatch.setattr("ib_analysis.search.output_changes.BLOCK_ELEMENTS", 2**16)
    np.testing.assert_allclose(prices(replay, OPTIONS[::20]), whole, rtol=1e-4, atol=1e-12)


class SharedRange:
    """Values of a run share the largest of its first tokens: what they become depends on which are kept."""

    def metadata(self, head_dim):
        return {"scale": MetadataRows(1, tokens_per_row=0)}

    def fit(self, x, lengths):
        runs = x.split(lengths.tolist())
        return {"scale": torch.stack([run.abs().max() if len(run) else run.new_ones(()) for run in runs]).half()[:, None]}

    def quantize(self, x, lengths, bits, fitted):
        scale = fitted["scale"].float().repeat_interleave(lengths.long(), 0)
        return ((x / scale + 1) / 2 * (2**bits - 1)).round().clamp(0, 2**bits - 1).to(torch.uint8), fitted

    def dequantize(self, codes, metadata, lengths, bits):
        return (codes.float() / (2**bits - 1) * 2 - 1) * metadata["scale"].float().repeat_interleave(lengths.long(), 0)


def check_prices(replay, options):
    """To 1e-4, or what comes of changes that are right to 5e-5 of that of evicting the head: sums are in float32."""
    found, expected, evicted = prices(replay, options), reference_prices(replay, options), prices(replay, [EVICTED])
    assert (np.abs(found - expected) <= 1e-4 * expected + 1e-4 * np.sqrt(expected * evicted) + 2.5e-9 * evicted).all()


def prices(replay, options):
    return gradient_losses(replay, options, torch.Generator().manual_seed(0)).numpy()


def reference_prices(replay, options):
    """The same in float64, from a replay of every option in every head: [heads, options]."""
    answered, gradients = score_gradients(replay, torch.Generator().manual_seed(0))
    layers = replay.followup_layers(list(zip(replay.spec.full_plans, *map(replay.spec.uniform, options))))
    rows = []
    for layer, head in replay.spec.shape.heads:
        one = answered[layer]
        kv_heads, head_dim = one.new_keys.shape[1], one.new_keys.shape[3]
        query = one.query.detach()[0].double().reshape(kv_heads, -1, head_dim)[head]
        direction = gradients[layer].double().reshape(len(gradients[layer]), kv_heads, -1, head_dim)[:, head]
        own = (one.new_keys.detach()[0, head].double(), one.new_values.detach()[0, head].double())
        contexts = contexts_of(replay, layers[layer], head, kv_heads)
        full, *outputs = [attended(query, context, own, one.scaling) for context in contexts]
        rows.append([float((direction * (output - full)).sum((1, 2)).square().mean() / 2) for output in outputs])
    return np.array(rows) / len(replay.example.predicting) / np.log(2)


def contexts_of(replay, layer, head, kv_heads):
    """Keys and values of the tokens that a head of a layer keeps under each of the plans tried, in float64."""
    first, rest, found = replay.first, replay.first + replay.tokens, {}
    for part in layer.parts:
        for keys, values, kept, pairs in zip(part.keys, part.values, part.kept, part.pairs.tolist()):
            visible = kept.clone()
            visible[:first] = visible[rest:] = True
            for pair in pairs:
                if pair % kv_heads == head:
                    found[pair // kv_heads] = (keys[visible].double(), values[visible].double())
    return [found[plan] for plan in sorted(found)]


def attended(query, context, own, scaling):
    """Attention of rows [G * M, D] to keys and values of a context, and causally to those of the follow-up itself."""
    (keys, values), (new_keys, new_values) = context, own
    length = len(new_keys)
    logits = query @ torch.cat([keys, new_keys]).T * scaling
    later = torch.ones(length, length, dtype=torch.bool).triu(1).repeat(len(query) // length, 1)
    logits[:, len(keys) :].masked_fill_(later, -torch.inf)
    return logits.softmax(-1) @ torch.cat([values, new_values])


@pytest.fixture
def random_model():
    """A replay of a random model with other numbers of heads and channels, whose attention is far from uniform."""

    def build(seed):
        torch.manual_seed(seed)
        heads, kv_heads, head_dim = ((4, 2, 32), (6, 3, 48), (2, 1, 64), (8, 2, 16))[seed]
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=heads * head_dim,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            initializer_range=0.3,
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        prompt = torch.randint(3, 64, (150 + 50 * seed,), generator=torch.Generator().manual_seed(seed))
        return Replay(model, spec_of(model), make_examples(model, None, [prompt])[0])

    return build


def test_small_losses_are_predicted_as_they_are_measured(embedded):
    """8 to 3 bits of all tokens, each head alone, means over prompts of natural text."""
    plans = [HeadPlan(fmt, (Tier(1.0, bits, bits),)) for fmt in ("kivi", "rotated") for bits in (8, 4, 3)]
    predicted, measured = [], []
    for number in range(8):
        replay = replay_of(embedded, "text", number)
        predicted.append(gradient_losses(replay, plans, torch.Generator().manual_seed(number)).flatten())
        tried = [replay.spec.single_head(head, plan) for head in replay.spec.shape.heads for plan in plans]
        measured.append(replay.measure(tried)[0])
    guess, loss = (torch.stack(rows).mean(0).numpy() for rows in (predicted, measured))
    assert spearmanr(guess, loss).statistic > 0.9
    assert 0.5 < np.median(guess / loss) < 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_a_16_bit_model_are_those_of_its_weights_in_32(dtype, small_llama, small_prompts):
    losses = []
    for model in (small_llama.to(dtype), copy.deepcopy(small_llama).float()):
        example = make_examples(small_llama, None, small_prompts[:1])[0]
        replay = Replay(model, spec_of(model), example)
        losses.append(gradient_losses(replay, OPTIONS[::7], torch.Generator().manual_seed(0)).flatten().numpy())
    assert spearmanr(losses[0], losses[1]).statistic > 0.9


def test_a_caller_without_gradients(small_llama, small_prompts):
    example = make_examples(small_llama, None, small_prompts[:1])[0]
    replay = Replay(small_llama, spec_of(small_llama), example)
    expected = gradient_losses(replay, OPTIONS[::7], torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(gradient_losses(replay, OPTIONS[::7], torch.Generator().manual_seed(0)), expected)


def test_chunks_of_heads_change_nothing(embedded, monkeypatch):
    replay = replay_of(embedded, "needles")
    whole = gradient_losses(replay, OPTIONS[::30], torch.Generator().manual_seed(1))
    monkeypatch.setattr("ib_analysis.search.gradient.HELD_ELEMENTS", 1)
    alone = gradient_losses(replay, OPTIONS[::30], torch.Generator().manual_seed(1))
    torch.testing.assert_close(alone, whole, rtol=1e-3, atol=1e-12)


def test_layers_without_gradients_are_refused(small_llama, small_prompts):
    replay = Replay(small_llama, spec_of(small_llama), make_examples(small_llama, None, small_prompts[:1])[0])
    last = small_llama.model.layers[1].self_attn.o_proj
    last.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(UnsupportedModelError, match="pass no gradients on"):
        gradient_losses(replay, OPTIONS[:2], torch.Generator().manual_seed(0))
