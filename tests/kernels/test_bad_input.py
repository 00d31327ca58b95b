"""What the kernels cannot do they refuse: nothing is launched, so this needs neither a GPU nor the interpreter."""

from dataclasses import replace

import pytest
import torch
from ib_kernels import Sides, Window, quantize_pack, schedule, unpack_tokens
from ib_kernels.decoding import packed_attention_triton

QUERY = torch.randn(2, 4, 64)
WINDOW = Window(torch.randn(2, 5, 64), torch.randn(2, 5, 64), torch.ones(1, 2, 5, dtype=torch.bool))


def pack(make=quantize_pack, **changed):
    keys, values = torch.randn(2, 1, 2, 20, 64)
    arguments = {
        "fmt": "kivi",
        "keys": keys,
        "values": values,
        "rows": torch.arange(40),
        "lengths": torch.tensor([20, 20], dtype=torch.int32),
        "pairs": torch.tensor([0, 1], dtype=torch.int32),
        "key_bits": 4,
        "value_bits": 2,
    }
    return make(**(arguments | changed))


PACKING = [
    ({"keys": torch.randn(1, 2, 20, 64).double()}, "float64"),
    ({"values": torch.randn(1, 2, 20, 64).double()}, "float64"),
    ({"keys": torch.randn(1, 2, 64, 20).transpose(2, 3)}, "contiguous"),
    ({"values": torch.randn(1, 2, 64, 20).transpose(2, 3)}, "contiguous"),
    ({"values": torch.randn(1, 2, 19, 64)}, "must both be"),
    ({"values": torch.randn(1, 2, 20, 64, device="meta")}, "one device"),
    ({"rows": torch.arange(40, device="meta")}, "one device"),
    ({"lengths": torch.tensor([20, 20], dtype=torch.int32, device="meta")}, "one device"),
    ({"pairs": torch.tensor([0, 1], dtype=torch.int32, device="meta")}, "one device"),
    ({"rows": torch.arange(80)[::2]}, "contiguous int64"),
    ({"rows": torch.arange(40, dtype=torch.int32)}, "contiguous int64"),
    ({"rows": torch.arange(1, 41)}, r"\[0, 40\)"),
    ({"rows": torch.arange(-1, 39)}, r"\[0, 40\)"),
    ({"lengths": torch.tensor([20, 19], dtype=torch.int32)}, "sum to 39"),
    ({"lengths": torch.tensor([41, -1], dtype=torch.int32)}, "negative"),
    ({"lengths": torch.tensor([20, 20])}, "int32"),
    ({"pairs": torch.tensor([0], dtype=torch.int32)}, "int32"),
    ({"key_bits": 5}, "5 bits"),
    ({"fmt": "zip"}, "zip"),
    ({"fmt": "rotated", "fitted": Sides({"centre": torch.zeros(2, 64)}, {})}, "centre must be fp16"),
    ({"fmt": "rotated", "fitted": Sides({"centre": torch.zeros(2, 32).half()}, {})}, "centre must be fp16"),
    ({"fmt": "rotated", "fitted": Sides({"mean": torch.zeros(2, 64).half()}, {})}, r"keep \['centre'\]"),
    ({"fmt": "rotated", "fitted": Sides({"centre": torch.zeros(2, 64, device="meta").half()}, {})}, "on meta"),
    ({"fmt": "rotated", "fitted": Sides({"centre": torch.zeros(2, 64).half()}, {"centre": torch.zeros(2, 64).half()})}, "values"),
]


@pytest.mark.parametrize(("changed", "message"), PACKING)
def test_packing_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        pack(**changed)


@pytest.mark.parametrize("fmt", ["kivi", "rotated"])
@pytest.mark.parametrize("head_dim", [40, 8, 272])
def test_kernels_refuse_head_dims(fmt, head_dim):
    keys = torch.randn(1, 2, 20, head_dim)
    with pytest.raises(ValueError, match=f"got {head_dim}"):
        pack(fmt=fmt, keys=keys, values=keys, backend="triton")
    held = pack(fmt=fmt, keys=keys, values=keys)
    with pytest.raises(ValueError, match=f"got {head_dim}"):
        unpack_tokens(held, "triton")
    with pytest.raises(ValueError, match=f"got {head_dim}"):
        packed_attention_triton(torch.randn(2, 4, head_dim), [held], None, 1.0)


ATTENTION = [
    (QUERY.double(), WINDOW, None, "float64"),
    (QUERY.transpose(1, 2).contiguous().transpose(1, 2), WINDOW, None, "contiguous"),
    (QUERY.to("meta"), WINDOW, None, "on meta"),
    (QUERY[:, :3], WINDOW, None, "mask"),
    (QUERY[:, :, :32], WINDOW, None, "head_dim"),
    (QUERY, replace(WINDOW, keys=WINDOW.keys.double()), None, "window of"),
    (QUERY, replace(WINDOW, values=WINDOW.values.double()), None, "window of"),
    (QUERY, replace(WINDOW, keys=torch.randn(2, 64, 5).transpose(1, 2)), None, "contiguous"),
    (QUERY, replace(WINDOW, mask=torch.ones(1, 5, 2, dtype=torch.bool).transpose(1, 2)), None, "contiguous"),
    (QUERY, replace(WINDOW, keys=WINDOW.keys.to("meta")), None, "one device"),
    (QUERY, replace(WINDOW, mask=torch.ones(1, 2, 5, dtype=torch.bool, device="meta")), None, "one device"),
    (QUERY, replace(WINDOW, mask=torch.ones(1, 2, 4, dtype=torch.bool)), None, "mask"),
    (QUERY, replace(WINDOW, values=torch.randn(2, 4, 64)), None, "must both be"),
    (QUERY, WINDOW, torch.zeros(2, 4).double(), "bias"),
    (QUERY, WINDOW, torch.zeros(4, 2).T, "contiguous"),
    (QUERY, WINDOW, torch.zeros(2, 4, device="meta"), "one device"),
]


@pytest.mark.parametrize(("query", "window", "bias", "message"), ATTENTION)
def test_attention_refuses(query, window, bias, message):
    with pytest.raises(ValueError, match=message):
        packed_attention_triton_as_called(query, [pack()], window, bias)


def test_attention_refuses_to_drop_gradients():
    with pytest.raises(ValueError, match="no gradients"):
        packed_attention_triton(QUERY.clone().requires_grad_(), [pack()], WINDOW, 1.0)


def packed_attention_triton_as_called(query, parts, window, bias):
    """The checks of `packed_attention` come first, as on a GPU."""
    from ib_kernels import decoding

    decoding._check(query, parts, window, bias)
    return packed_attention_triton(query, parts, window, 1.0, bias=bias)


PARTS = [
    (lambda held: {"lengths": torch.tensor([20, 21], dtype=torch.int32)}, "holds 40"),
    (lambda held: {"lengths": torch.tensor([41, -1], dtype=torch.int32)}, "negative"),
    (lambda held: {"lengths": torch.tensor([1, 39], dtype=torch.int32)}, "groups of keys"),
    (lambda held: {"pairs": torch.tensor([0, 2], dtype=torch.int32)}, "pairs must lie"),
    (lambda held: {"pairs": held.pairs.to("meta")}, "one device"),
    (lambda held: {"values": held.values | {"words": held.values["words"][:39]}}, "39 values"),
    (lambda held: {"values": held.values | {"scale": held.values["scale"][:39]}}, "values scale"),
    (lambda held: {"values": held.values | {"minimum": held.values["minimum"].float()}}, "values minimum"),
    (lambda held: {"keys": held.keys | {"minimum": held.keys["minimum"][:1]}}, "keys minimum"),
    (lambda held: {"keys": held.keys | {"words": held.keys["words"].T.contiguous().T}}, "contiguous"),
]


@pytest.mark.parametrize(("change", "message"), PARTS)
def test_attention_refuses_parts(change, message):
    held = pack()
    with pytest.raises(ValueError, match=message):
        packed_attention_triton_as_called(QUERY, [replace(held, **change(held))], None, None)


def test_attention_refuses_parts_of_16_bits():
    held = replace(pack(), key_bits=16, value_bits=16, keys={"words": torch.randn(40, 64)}, values={"words": torch.randn(40, 64)})
    with pytest.raises(ValueError, match="float64"):
        packed_attention_triton(QUERY, [replace(held, keys={"words": held.keys["words"].double()})], None, 1.0)
    with pytest.raises(ValueError, match="pack both"):
        packed_attention_triton(QUERY, [replace(pack(), key_bits=16, keys=held.keys)], None, 1.0)


def test_attention_refuses_the_schedule_of_other_parts():
    held = pack()
    made = schedule([held], 2, QUERY.device, items=4)
    with pytest.raises(ValueError, match="schedule again"):
        packed_attention_triton(QUERY, [held, held], None, 1.0, schedule=made)
    with pytest.raises(ValueError, match="schedule again"):
        packed_attention_triton(QUERY, [held], None, 1.0, schedule=schedule([held], 3, QUERY.device, items=4))


def test_no_schedule_for_parts_without_a_kernel():
    keys, values = torch.randn(2, 1, 2, 20, 40)
    with pytest.raises(ValueError, match="multiple of 16 up to 256, got 40"):
        schedule([pack(keys=keys, values=values)], 2, QUERY.device)
