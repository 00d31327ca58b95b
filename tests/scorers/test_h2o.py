"""H2O against its definition."""

import pytest
import torch
from materialised import PADDED, SCALING, T, attention, left_padded, of_groups

from ib_analysis.scorers import scorer
from ib_analysis.scorers.h2o import h2o

MODULE = torch.nn.Module()


@pytest.mark.parametrize("queries", [T, 5])
@pytest.mark.parametrize("chunk_bytes", [1, 3000, 2**26])
def test_scores_are_mean_weights_of_the_queries_that_see_a_token(monkeypatch, queries, chunk_bytes):
    monkeypatch.setattr(scorer, "CHUNK_BYTES", chunk_bytes)
    query, keys, values, valid = left_padded(queries)
    weights = of_groups(attention(query, keys, valid))  # [B, H_kv, M, T]
    seen_by = (torch.arange(T) <= torch.arange(T - queries, T)[:, None]).sum(0)
    found = h2o(MODULE, query, keys, values, valid, SCALING)
    torch.testing.assert_close(found.double(), weights.sum(2) / seen_by, atol=1e-6, rtol=1e-4)
    assert not found[1, :, :PADDED].any()


def test_no_tensor_grows_with_queries_times_tokens(monkeypatch):
    monkeypatch.setattr(scorer, "CHUNK_BYTES", 2**14)
    query, keys = torch.randn(1, 4, 512, 8), torch.randn(1, 2, 512, 8)
    largest = max(weights.numel() for weights in scorer.attention_blocks(query, keys, torch.ones(1, 512, dtype=torch.bool), 0.3))
    assert largest <= 2**14 // 4
