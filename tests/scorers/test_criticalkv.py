"""CriticalKV against its definition."""

import pytest
import torch
from materialised import GROUPS, H_KV, SCALING, D, H, attention, left_padded, of_groups

from ib_analysis.errors import UnsupportedModelError
from ib_analysis.scorers import SnapKV, criticalkv
from ib_analysis.scorers.criticalkv import CriticalKV

HIDDEN = 24


@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
def test_scores_are_weights_times_norms_of_projected_values(monkeypatch, chunk_bytes):
    monkeypatch.setattr(criticalkv, "CHUNK_BYTES", chunk_bytes)
    query, keys, values, valid = left_padded()
    module = torch.nn.Module()
    module.o_proj = torch.nn.Linear(H * D, HIDDEN, bias=False)
    weights = of_groups(attention(query, keys, valid))[:, :, -8:].mean(2)
    weights[..., -8:] = 1.0  # as SnapKV has it for observed tokens
    norms = torch.zeros_like(weights)
    for head in range(H):
        columns = module.o_proj.weight.double()[:, head * D : (head + 1) * D]  # [hidden, D]
        norms[:, head // GROUPS] += (values[:, head // GROUPS].double() @ columns.T).abs().sum(-1) / GROUPS
    found = CriticalKV(SnapKV(window=8, kernel=1))(module, query, keys, values, valid, SCALING)
    assert found.shape == (2, H_KV, 40) and not found.requires_grad
    torch.testing.assert_close(found.double(), ((weights + 1e-4) * norms).detach(), atol=1e-6, rtol=1e-4)


def test_a_layer_without_projection_is_refused_by_name():
    query, keys, values, valid = left_padded()
    with pytest.raises(UnsupportedModelError, match="Module has no o_proj to multiply values by: use another scorer"):
        CriticalKV()(torch.nn.Module(), query, keys, values, valid, SCALING)
