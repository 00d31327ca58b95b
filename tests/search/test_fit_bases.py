"""Bases against what they are for: unit errors cost the same in every channel, and channels are sorted by variance."""

from dataclasses import replace
from random import Random

import pytest
import torch
from ib_kernels import Bases
from transformers import AutoModelForCausalLM, CohereConfig, GlmConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ib_analysis.cache.plan import HeadPlan, Recent, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.shape import CacheShape, LayerShape, cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replay import Replay
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS
from ib_analysis.search.fit_bases import RIDGE, at_lengths, fit_bases, summed
from ib_analysis.search.token_losses import token_losses
from ib_analysis.tasks import TASKS

SHAPE = CacheShape((LayerShape(2, 16), LayerShape(1, 16, sliding_window=8), LayerShape(1, 16)))
SPEC = CacheSpec(SHAPE, Recent(1, 2, 1), SCORERS["value_aware"])


def random_moments(seed):
    """Positive definite [3, 16, 16], of variances that differ much."""
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(3, 16, 16, generator=generator, dtype=torch.float64) * torch.logspace(1, -1, 16, dtype=torch.float64)
    return roots @ roots.mT


def moments(seed=0):
    """Of queries and keys of each head."""
    return list(torch.stack([random_moments(seed), random_moments(seed + 100)], 1))


def normed(moments):
    return moments / moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]


def bases_of(found, layer, head):
    """Of one head, in float64."""
    bases = found.of([(layer, head)])
    return Bases(bases.into[0].double(), bases.back[0].double())


def test_sliding_layers_have_none_and_heads_their_own():
    found = fit_bases(SPEC, moments())
    assert [None if layer is None else tuple(layer.shape) for layer in found.layers] == [(2, 16, 16), None, (1, 16, 16)]
    assert {layer.dtype for layer in found.layers if layer is not None} == {torch.float16}


def test_a_unit_error_costs_the_same_in_every_channel():
    all_moments, found = moments(), fit_bases(SPEC, moments())
    metric = normed(torch.stack(all_moments)[:, 0]) + RIDGE * torch.eye(16)
    for u, (layer, head) in enumerate(SHAPE.heads):
        back = bases_of(found, layer, head).back
        cost = back @ metric[u] @ back.mT
        torch.testing.assert_close(cost / cost.diagonal().mean(), torch.eye(16, dtype=torch.float64), atol=0.02, rtol=0)


def test_channels_are_sorted_uncorrelated_across_quarters_and_alike_within():
    all_moments, found = moments(), fit_bases(SPEC, moments())
    for u, (layer, head) in enumerate(SHAPE.heads):
        into = bases_of(found, layer, head).into
        variance = into.mT @ all_moments[u][1] @ into
        of_quarters = variance.diagonal().reshape(4, 4)
        assert (of_quarters.mean(1).diff() < 0).all()
        torch.testing.assert_close(of_quarters / of_quarters.mean(1, keepdim=True), torch.ones(4, 4).double(), atol=0.05, rtol=0)
        across = variance / variance.diagonal().outer(variance.diagonal()).sqrt()
        blocks = torch.block_diag(*[torch.ones(4, 4)] * 4).bool()
        assert across[~blocks].abs().max() < 0.05


def test_heads_on_which_nothing_depends_have_a_basis():
    for matrices in fit_bases(SPEC, [torch.zeros(2, 16, 16).double()] * 3).layers:
        assert matrices is None or (matrices.isfinite().all() and matrices.double().det().abs().gt(0).all())


@pytest.mark.slow
def test_keys_lose_less_in_their_bases_on_other_prompts(embedded):
    model, tokenizer = embedded
    spec = CacheSpec(cache_shape(model.config), Recent(1, 2, 1), SCORERS["streaming_llm"])
    seen, fresh = (
        make_examples(
            model, tokenizer, [TASKS[name](Random(f"{kind} {i}"), 256) for i in range(6) for name in ("retrieval", "text")]
        )
        for kind in ("seen", "fresh")
    )
    generator = torch.Generator().manual_seed(0)
    total: list[torch.Tensor] = []
    for example in seen:
        total = summed(total, token_losses(Replay(model, spec, example), generator).moments)
    found = fit_bases(spec, total)
    based = CacheSpec(spec.shape, spec.recent, spec.scorer, found)
    means = [
        Replays(model, spec, fresh).measure([spec.uniform(HeadPlan(fmt, (Tier(1.0, 3, 8),)))])[0].mean()
        for fmt, spec in (("rotated", spec), ("spectral", based))
    ]
    assert means[1] < 0.75 * means[0]


def test_moments_at_lengths_are_those_of_keys_and_queries_there(shared_llama):
    """The same 100 vectors in each hundred of positions, turned as the model turns them."""
    tokens, longest, dim = 100, 512, 8  # as many positions as the model has
    vectors = torch.randn(2, tokens, dim).double()  # queries and keys
    lengths, weights = (100, 200, 400), torch.tensor([4, 2, 1]).double() / 7

    def moment_at(x, first):
        positions = torch.arange(first, first + tokens)[None]
        turned, _ = apply_rotary_pos_emb(x[None, None], x[None, None], *shared_llama.model.rotary_emb(x[None], positions))
        return turned[0, 0].mT @ turned[0, 0] / tokens

    queries = torch.stack([moment_at(vectors[0], n - tokens) for n in lengths])
    keys = torch.stack([torch.stack([moment_at(vectors[1], b) for b in range(0, n, tokens)]).mean(0) for n in lengths])
    assert shared_llama.config.max_position_embeddings == longest
    plain = torch.stack([moment_at(x, 0) for x in vectors])
    found = at_lengths(shared_llama, [plain], tokens)
    expected = torch.einsum("n,snij->sij", weights, torch.stack([queries, keys]))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(at_lengths(shared_llama, [plain], 300)[0], plain, rtol=1e-6, atol=1e-6)  # 600 are too many


@pytest.mark.parametrize("config", [CohereConfig, GlmConfig], ids=["neighbours", "some channels"])
def test_moments_stay_where_it_is_not_known_how_positions_turn_channels(config):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(config(vocab_size=64, num_key_value_heads=2, pad_token_id=0, **sizes))
    plain = torch.randn(2, 8, 8).double()
    assert torch.equal(at_lengths(model, [plain], 100)[0], plain)


@pytest.mark.slow
def test_bases_hold_for_longer_contexts(embedded):
    model, tokenizer = embedded
    spec = CacheSpec(cache_shape(model.config), Recent(1, 2, 1), SCORERS["streaming_llm"])
    seen, fresh = (
        make_examples(model, tokenizer, [TASKS["text"](Random(f"{kind} {i}"), length) for i in range(count)])
        for kind, length, count in (("seen", 192, 8), ("fresh", 768, 4))
    )
    generator = torch.Generator().manual_seed(0)
    total: list[torch.Tensor] = []
    for example in seen:
        total = summed(total, token_losses(Replay(model, spec, example), generator).moments)
    plans = [spec.uniform(HeadPlan("spectral", (Tier(1.0, 2, 8),)))]
    losses = [
        Replays(model, replace(spec, bases=fit_bases(spec, moments)), fresh).measure(plans)[0].mean()
        for moments in (total, at_lengths(model, total, 192))
    ]
    assert losses[1] < 0.75 * losses[0]
