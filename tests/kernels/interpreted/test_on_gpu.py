"""What only a GPU can show."""

import pytest
import torch
from ib_kernels import Window, decoding_triton, schedule
from ib_kernels.decoding import packed_attention_triton


@pytest.fixture(autouse=True)
def needs_gpu(device):
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")


@pytest.mark.parametrize("fmt", ["kivi", "rotated", "spectral"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_assembly_changes_no_bit(monkeypatch, make_packed, guard, fmt, bits, head_dim):
    packed, query = guard(make_packed(fmt, [700, 129], head_dim, bits, bits, outlier=200.0)), torch.randn(2, 4, head_dim)
    query = guard(query.to(torch.bfloat16))
    fast = packed_attention_triton(query, [packed], None, head_dim**-0.5)
    monkeypatch.setattr(decoding_triton, "ASSEMBLY", False)
    plain = packed_attention_triton(query, [packed], None, head_dim**-0.5)
    for a, b in zip(fast, plain):
        assert torch.equal(a, b)


def test_a_captured_step_gives_what_a_call_gives(make_packed, guard):
    parts = [guard(make_packed("kivi", [300, 129], 128)), guard(make_packed("rotated", [64, 0], 128, 2, 2))]
    window = guard(Window(*torch.randn(2, 2, 50, 128).to(torch.bfloat16)))
    query, newer = torch.randn(2, 2, 4, 128).to("cuda", torch.bfloat16)
    made = schedule(parts, 2, query.device)
    packed_attention_triton(query, parts, window, 0.1, schedule=made)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = packed_attention_triton(query, parts, window, 0.1, schedule=made)
    query.copy_(newer)
    graph.replay()
    for a, b in zip(captured, packed_attention_triton(newer, parts, window, 0.1, schedule=made)):
        assert torch.equal(a, b)
