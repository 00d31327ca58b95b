"""ExpectedAttention against its definition, with queries before rotation and the rotation of transformers."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb

from ib_analysis.errors import UnsupportedModelError
from ib_analysis.scorers import expected_attention
from ib_analysis.scorers.expected_attention import ExpectedAttention

H, H_KV, T, D = 4, 2, 40, 8
SCALING = D**-0.5
CONFIG = LlamaConfig(hidden_size=H * D, num_attention_heads=H, num_key_value_heads=H_KV, num_hidden_layers=1)


@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
def test_scores_are_those_of_gaussian_queries_to_come(monkeypatch, chunk_bytes):
    monkeypatch.setattr(expected_attention, "CHUNK_BYTES", chunk_bytes)
    raw_query, raw_keys, values = torch.randn(1, H, T, D), torch.randn(1, H_KV, T, D), torch.randn(1, H_KV, T, D)
    rotary = LlamaRotaryEmbedding(CONFIG)
    query, keys = apply_rotary_pos_emb(raw_query, raw_keys, *rotary(raw_query, torch.arange(T)[None]))
    scorer = ExpectedAttention(future=30, sinks=3)
    found = scorer(LlamaAttention(CONFIG, 0), query, keys, values, torch.ones(1, T, dtype=torch.bool), SCALING)
    turned = rotary(raw_query, torch.arange(T, T + 30)[None])
    eye = torch.eye(D)[:, None].expand(D, 30, D)  # each channel, turned by each position
    mean_turn = apply_rotary_pos_emb(eye[None], eye[None], *turned)[0][0].double().mean(1)  # [D, D]
    for head in range(H_KV):
        weights = []
        for group in range(H // H_KV):
            used = raw_query[0, head * (H // H_KV) + group, 3:].double()
            mean, covariance = used.mean(0) @ mean_turn, mean_turn.T @ torch.cov(used.T, correction=0) @ mean_turn
            k = keys[0, head].double() * SCALING
            weights.append((k @ mean + ((k @ covariance) * k).sum(-1) / 2)[3:].softmax(-1))
        expected = torch.stack(weights).mean(0) * values[0, head, 3:].double().norm(dim=-1)
        torch.testing.assert_close(found[0, head, 3:].double(), expected, atol=1e-6, rtol=1e-4)
        assert (found[0, head, :3] == found.max()).all()


@pytest.mark.parametrize("parameters", [None, {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}])
def test_other_positions_are_refused_by_name(parameters):
    module = torch.nn.Module()
    if parameters is not None:
        module.config = LlamaConfig(rope_parameters=parameters)
    x = torch.randn(1, 2, 10, 8)
    with pytest.raises(UnsupportedModelError, match=r"queries to come are not known: use another scorer"):
        ExpectedAttention()(module, x, x, x, torch.ones(1, 10, dtype=torch.bool), SCALING)
