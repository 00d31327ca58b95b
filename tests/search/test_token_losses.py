"""What the gradient says of tokens evicted alone, against definition and measurement."""

from random import Random

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from ib_analysis.cache.plan import HeadPlan, Recent, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import make_examples
from ib_analysis.replay.replay import Replay
from ib_analysis.scorers import SCORERS
from ib_analysis.search.gradient import attending, score_gradients
from ib_analysis.search.token_losses import token_losses
from ib_analysis.tasks import TASKS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def replay(embedded):
    model, tokenizer = embedded
    example = make_examples(model, tokenizer, [TASKS["text"](Random("token losses"), 256)])[0]
    return Replay(model, CacheSpec(cache_shape(model.config), Recent(2, 6, 2), SCORERS["value_aware"]), example)


def test_losses_are_those_of_the_definition(replay):
    found = token_losses(replay, torch.Generator().manual_seed(0)).evicted
    assert found.shape == (len(replay.spec.shape.heads), replay.tokens)
    answered, gradients = score_gradients(replay, torch.Generator().manual_seed(0))
    for u, (layer, head) in enumerate(replay.spec.shape.heads):
        heads = attending(replay, [(layer, head)], answered, gradients)
        query, keys, values = heads.query[0].double(), heads.keys[0].double(), heads.values[0].double()
        sums = (query @ keys.T * heads.scaling).exp()
        weights = sums / (sums.sum(1) + heads.exact[1][0].double().exp())[:, None]  # [R, n]
        change = weights[..., None] * (values - heads.full[0].double()[:, None])  # [R, n, D]
        along = torch.einsum("rnd,srd->sn", change, heads.directions[0].double())
        torch.testing.assert_close(found[u].double(), along.square().sum(0), rtol=1e-3, atol=1e-6 * float(found[u].max()))


def test_moments_are_weighted_by_what_errors_of_logits_cost(replay):
    """The change of a logit that costs: the output's derivative by it, along the gradient."""
    found = token_losses(replay, torch.Generator().manual_seed(0))
    answered, gradients = score_gradients(replay, torch.Generator().manual_seed(0))
    layer, head = replay.spec.shape.heads[1]
    heads = attending(replay, [(layer, head)], answered, gradients)
    query, keys, values = heads.query[0].double(), heads.keys[0].double(), heads.values[0].double()
    exact_out, exact_lse = heads.exact[0][0].double(), heads.exact[1][0].double()
    change = torch.zeros(len(query), len(keys), dtype=torch.float64, requires_grad=True)
    sums = (query @ keys.T * heads.scaling + change).exp()
    out = (sums @ values + exact_lse.exp()[:, None] * exact_out) / (sums.sum(1) + exact_lse.exp())[:, None]
    costs = torch.zeros_like(change)
    for direction in heads.directions[0].double():
        costs = costs + torch.autograd.grad((out * direction).sum(), change, retain_graph=True)[0].square()
    centred = keys - keys.mean(0)
    for moments, rows, weights in ((found.moments[1][0], query, costs.sum(1)), (found.moments[1][1], centred, costs.sum(0))):
        plain, weighted = rows.T @ rows, torch.einsum("n,nd,ne->de", weights, rows, rows)
        expected = plain / plain.diagonal().mean() + weighted / weighted.diagonal().mean()
        torch.testing.assert_close(moments, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_tokens_that_lose_more_are_those_that_measurement_says(replay):
    """Each of 40 tokens evicted alone, in the last layer, where nothing comes in between."""
    layer, head = replay.spec.shape.heads[-1]
    losses = token_losses(replay, torch.Generator().manual_seed(0)).evicted[-1]
    tokens = losses.argsort(descending=True)[np.linspace(0, replay.tokens - 1, 40).astype(int)].tolist()
    but_one = HeadPlan("rotated", (Tier((replay.tokens - 1) / replay.tokens, 16, 16),))
    ranks, measured = replay.ranks[layer].clone(), []
    try:
        for token in tokens:
            order = [other for other in range(replay.tokens) if other != token] + [token]
            replay.ranks[layer][head, replay.first : replay.first + replay.tokens] = torch.tensor(order).argsort()
            measured.append(float(replay.measure([replay.spec.single_head((layer, head), but_one)])[0]))
    finally:
        replay.ranks[layer] = ranks
    assert spearmanr(measured, losses[tokens]).statistic > 0.8
