"""What runs where, and what is refused."""

import dataclasses
import logging

import pytest
import torch
from ib_kernels import Window, backends, packed_attention, plan, quantize_pack, unpack_tokens
from ib_kernels.backends import VARIABLE, default_backend, pick_backend
from ib_kernels.decoding import packed_attention_triton
from ib_kernels.packing import quantize_pack_triton

GPU = torch.device("cuda")


@pytest.fixture
def gpu_that_runs_kernels(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(backends, "without_kernels", lambda device: None)
    backends._log_once.cache_clear()


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
        (64, ("other", 4, 4), "not 'other'"),
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
    backends._log_once.cache_clear()
    assert default_backend(GPU) == pick_backend(GPU, 64, []) == "reference"
    (record,) = caplog.records
    assert "Triton is not installed" in record.message


def test_the_variable_overrules(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert default_backend(GPU) == "reference"
    monkeypatch.setenv(VARIABLE, "triton")
    assert default_backend(GPU) == "triton"
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match="IB_KERNELS must be one of"):
        default_backend(GPU)


def random_step(make_packed, head_dim=32):
    parts = [make_packed("kivi", [5, 3], head_dim), make_packed("rotated", [0, 40], head_dim)]
    keys, values = torch.randn(2, 2, 6, head_dim)
    return torch.randn(2, 4, head_dim), parts, Window(keys, values, torch.ones(2, 1, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, parts, w: (q.double(), parts, w), "take a query of"),
        (lambda q, parts, w: (q, parts, Window(w.keys.double(), w.values, w.mask)), "take a window of"),
        (lambda q, parts, w: (q.transpose(0, 1).contiguous().transpose(0, 1), parts, w), "contiguous"),
        (lambda q, parts, w: (q, parts, Window(strided(w.keys), w.values, w.mask)), "contiguous"),
        (lambda q, parts, w: (q, parts, Window(w.keys, w.values, strided(w.mask))), "contiguous"),
        (lambda q, parts, w: (q, [with_strided_words(parts[0]), parts[1]], w), "contiguous"),
    ],
)
def test_kernels_refuse(make_packed, change, message):
    """Before anything runs, so without a GPU too."""
    query, parts, window = change(*random_step(make_packed))
    with pytest.raises(ValueError, match=message):
        packed_attention_triton(query, parts, window, 0.2)


def strided(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.shape[-1] > 1 else x


def with_strided_words(part):
    return dataclasses.replace(part, keys={**part.keys, "words": strided(part.keys["words"])})


def test_kernels_refuse_other_head_dims_and_mixed_precision(make_packed):
    query, parts, window = random_step(make_packed, head_dim=40)
    with pytest.raises(ValueError, match="multiple of 16"):
        packed_attention_triton(query, parts, window, 0.2)
    with pytest.raises(ValueError, match="multiple of 16"):
        unpack_tokens(parts[0], "triton")
    keys = torch.randn(1, 1, 8, 40)
    rows, lengths = torch.arange(8), torch.tensor([8], dtype=torch.int32)
    with pytest.raises(ValueError, match="multiple of 16"):
        quantize_pack_triton("kivi", keys, keys, rows, lengths, 4, 4, None)
    with pytest.raises(ValueError, match="keys of 16 with values of 4 bits"):
        quantize_pack_triton("kivi", keys[..., :32], keys[..., :32], rows, lengths, 16, 4, None)
    with pytest.raises(ValueError, match="must be of"):
        quantize_pack("kivi", keys.double(), keys.double(), rows, lengths, lengths, 4, 4)


def test_a_plan_of_other_parts_is_refused(make_packed):
    query, parts, window = random_step(make_packed)
    for step in (plan(parts[:1], 2, query.device), plan(parts, 3, query.device)):
        with pytest.raises(ValueError, match="call plan again"):
            packed_attention_triton(query, parts, window, 0.2, step=step)


def test_tensors_on_two_devices_are_refused(make_packed):
    query, parts, window = random_step(make_packed)
    elsewhere = Window(window.keys, window.values, window.mask.to("meta"))
    with pytest.raises(ValueError, match="move them to one device"):
        packed_attention(query, parts, elsewhere, 0.2)
    moved = dataclasses.replace(parts[0], pairs=parts[0].pairs.to("meta"))
    with pytest.raises(ValueError, match="move them to one device"):
        packed_attention(query, [moved], window, 0.2)
    keys = torch.randn(1, 1, 8, 32)
    lengths = torch.tensor([8], dtype=torch.int32)
    with pytest.raises(ValueError, match="one device"):
        quantize_pack("kivi", keys, keys, torch.arange(8, device="meta"), lengths, lengths, 4, 4)


def test_one_side_at_16_bits_is_stored_and_read_in_plain_torch(exact_attention):
    keys, values = torch.randn(2, 1, 1, 40, 32)
    rows, lengths = torch.arange(40), torch.tensor([40], dtype=torch.int32)
    query = torch.randn(1, 4, 32)
    for key_bits, value_bits in ((16, 4), (3, 16)):
        pairs = torch.zeros(1, dtype=torch.int32)
        packed = quantize_pack("rotated", keys, values, rows, lengths, pairs, key_bits, value_bits, backend="reference")
        out, _ = packed_attention(query, [packed], None, 0.2, backend="reference")
        torch.testing.assert_close(out.double(), exact_attention(query, [packed], None, 0.2)[0], atol=1e-5, rtol=1e-5)
