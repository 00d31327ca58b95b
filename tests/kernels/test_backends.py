"""What runs where."""

import logging

import pytest
import torch
from ib_kernels import backends, packed_attention, quantize_pack
from ib_kernels.backends import VARIABLE, default_backend, pick_backend

GPU = torch.device("cuda")


@pytest.fixture
def gpu_that_runs_kernels(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(backends, "without_kernels", lambda device: None)
    backends._plain_torch.cache_clear()


def test_a_cpu_runs_plain_torch_and_says_nothing(caplog, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with caplog.at_level(logging.DEBUG):
        assert pick_backend(torch.device("cpu"), 40, [("kivi", 4, 4)]) == "reference"
    assert not caplog.records


def test_a_gpu_runs_the_kernels(gpu_that_runs_kernels, caplog):
    forms = [("kivi", 2, 8), ("rotated", 3, 4), ("kivi", 16, 16)]
    assert pick_backend(GPU, 128, forms) == "triton"
    assert not caplog.records


@pytest.mark.parametrize(
    ("head_dim", "form", "reason"),
    [
        (40, ("kivi", 4, 4), "multiple of 16"),
        (272, ("kivi", 4, 4), "up to 256"),
        (64, ("kivi", 16, 4), "keys of 16 with values of 4 bits"),
    ],
)
def test_a_gpu_falls_back_and_says_so_once(gpu_that_runs_kernels, caplog, head_dim, form, reason):
    for _ in range(3):
        assert pick_backend(GPU, head_dim, [("rotated", 4, 4), form]) == "reference"
    (record,) = caplog.records
    assert reason in record.message and "plain PyTorch" in record.message


def test_a_gpu_without_triton_falls_back(monkeypatch, caplog):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(backends, "without_kernels", lambda device: "Triton is not installed")
    backends._plain_torch.cache_clear()
    assert default_backend(GPU) == pick_backend(GPU, 64, []) == "reference"
    (record,) = caplog.records
    assert "Triton is not installed" in record.message


def test_the_variable_overrules(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert default_backend(GPU) == "reference"
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.setattr(backends, "without_kernels", lambda device: None)
    assert default_backend(GPU) == "triton"
    monkeypatch.setattr(backends, "without_kernels", lambda device: "Triton is not installed")
    with pytest.raises(ValueError, match="IB_KERNELS=triton cannot be: Triton is not installed"):
        default_backend(GPU)
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match="IB_KERNELS must be one of"):
        default_backend(GPU)


def test_one_side_at_16_bits_is_stored_and_read_in_plain_torch(exact_attention):
    keys, values = torch.randn(2, 1, 1, 40, 32)
    rows, lengths = torch.arange(40), torch.tensor([40], dtype=torch.int32)
    query = torch.randn(1, 4, 32)
    for key_bits, value_bits in ((16, 4), (3, 16)):
        pairs = torch.zeros(1, dtype=torch.int32)
        packed = quantize_pack("rotated", keys, values, rows, lengths, pairs, key_bits, value_bits, backend="reference")
        out, _ = packed_attention(query, [packed], None, 0.2, backend="reference")
        torch.testing.assert_close(out.double(), exact_attention(query, [packed], None, 0.2)[0], atol=1e-5, rtol=1e-5)
