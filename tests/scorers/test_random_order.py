"""Random order: uniform, another one in each layer and head, the same counted from the end."""

import torch
from scipy.stats import kstest

from ib_analysis.scorers.random_order import RandomOrder


def drawn(tokens, layer=0, seed=0, batch=1):
    module = torch.nn.Module()
    module.layer_idx = layer
    keys = torch.zeros(batch, 2, tokens, 8)
    return RandomOrder(seed)(module, keys, keys, keys, torch.ones(batch, tokens, dtype=torch.bool), 1.0)


def test_scores_are_uniform():
    assert kstest(drawn(4000).flatten(), "uniform").pvalue > 1e-3


def test_layers_heads_and_seeds_differ():
    orders = [drawn(64, layer, seed)[0, head].argsort() for layer in range(2) for seed in range(2) for head in range(2)]
    assert len({tuple(order.tolist()) for order in orders}) == 8


def test_tokens_before_others_change_nothing():
    assert torch.equal(drawn(100)[..., -64:], drawn(64))
    assert torch.equal(drawn(64, batch=3)[2], drawn(64)[0])
