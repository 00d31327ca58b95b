"""SnapKV against its definition, written out with loops in float64."""

import math

import pytest
import torch

from ib_analysis.scorers import SnapKV

B, H, H_KV, T, D = 2, 4, 2, 40, 8
PADDED = 11  # tokens of the second sequence
SCALING = D**-0.5
MODULE = torch.nn.Module()
SETTINGS = [SnapKV(), SnapKV(window=8, kernel=3), SnapKV(window=60, kernel=1)]  # the last observes all queries


def left_padded(queries=T):
    """(query, keys, values, valid): the second sequence is padded on the left, with what nobody must read."""
    query, (keys, values) = torch.randn(B, H, queries, D), torch.randn(2, B, H_KV, T, D)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, :PADDED] = False
    keys[1, :, :PADDED] = 50.0
    return query, 2 * keys, values, valid


def written_out(scorer, query, keys, valid):
    """Mean over the last queries of a KV head of what they attend to an older token, averaged over its neighbours."""
    grouped, queries = H // H_KV, query.shape[2]
    observed = min(scorer.window, queries)
    scores = torch.zeros(B, H_KV, T, dtype=torch.float64)
    for b in range(B):
        for kv in range(H_KV):
            mean = [0.0] * T
            for h in range(grouped * kv, grouped * (kv + 1)):
                for m in range(queries - observed, queries):
                    seen = [t for t in range(T - queries + m + 1) if valid[b, t]]
                    logits = [float(query[b, h, m].double() @ keys[b, kv, t].double()) * SCALING for t in seen]
                    total = math.fsum(math.exp(logit - max(logits)) for logit in logits)
                    for t, logit in zip(seen, logits):
                        mean[t] += math.exp(logit - max(logits)) / total / (grouped * observed)
            for t in range(T):
                around = range(t - scorer.kernel // 2, t + scorer.kernel // 2 + 1)
                older = math.fsum(mean[i] for i in around if 0 <= i < T - observed)
                scores[b, kv, t] = older / scorer.kernel if t < T - observed else 1.0
    return scores


@pytest.mark.parametrize("queries", [T, 5])
@pytest.mark.parametrize("scorer", SETTINGS, ids=str)
def test_scores_are_those_of_the_definition(scorer, queries):
    query, keys, values, valid = left_padded(queries)
    found = scorer(MODULE, query, keys, values, valid, SCALING)
    torch.testing.assert_close(found.double(), written_out(scorer, query, keys, valid), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("scorer", SETTINGS, ids=str)
def test_left_padding_does_not_change_the_order(scorer):
    query, keys, values, valid = left_padded()
    padded = scorer(MODULE, query, keys, values, valid, SCALING)[1, :, PADDED:]
    alone = scorer(MODULE, query[1:, :, PADDED:], keys[1:, :, PADDED:], values[1:, :, PADDED:], valid[1:, PADDED:], SCALING)[0]
    assert torch.equal(padded.argsort(dim=-1, stable=True), alone.argsort(dim=-1, stable=True))


def test_only_the_last_queries_count():
    query, keys, values, valid = left_padded()
    scorer = SnapKV(window=8)
    before = scorer(MODULE, query, keys, values, valid, SCALING)
    query[:, :, :-8] = torch.randn(B, H, T - 8, D)
    assert torch.equal(scorer(MODULE, query, keys, values, valid, SCALING), before)
