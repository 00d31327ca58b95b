"""The kernels that quantize, pack and unpack: the same bits as the formats have in plain torch."""

import os
from itertools import product

import pytest
import torch
from ib_kernels import PackedTokens, Sides, quantize_pack, unpack_tokens
from ib_kernels.formats.kivi import kernels as kivi_kernels
from ib_kernels.formats.rotated import kernels as rotated_kernels
from ib_kernels.formats.rotated import reference as rotated_reference
from torch.utils._python_dispatch import TorchDispatchMode

LENGTHS = [33, 0, 1, 70]
CASES = [
    # format, key bits, value bits, head_dim, dtype, lengths
    ("kivi", 4, 4, 128, torch.bfloat16, LENGTHS),
    ("kivi", 2, 8, 96, torch.float16, LENGTHS),
    ("kivi", 3, 2, 64, torch.float32, [129, 1, 128, 127]),
    ("kivi", 8, 3, 80, torch.bfloat16, LENGTHS),
    ("kivi", 3, 4, 256, torch.bfloat16, [35, 0, 0, 1]),
    ("kivi", 4, 2, 16, torch.float32, LENGTHS),
    ("rotated", 4, 4, 128, torch.bfloat16, [33, 0, 1, 30]),
    ("rotated", 2, 8, 96, torch.float16, LENGTHS),
    ("rotated", 3, 2, 64, torch.float32, [33, 0, 1, 30]),
    ("rotated", 8, 2, 64, torch.bfloat16, [129, 1, 128, 127]),
    ("rotated", 8, 3, 48, torch.bfloat16, [33, 0, 1, 30]),
    ("rotated", 4, 2, 16, torch.float32, LENGTHS),
    ("spectral", 4, 2, 64, torch.bfloat16, [33, 0, 1, 30]),
]
if os.environ.get("TRITON_INTERPRET") != "1":  # a GPU takes no time for all of them
    dtypes = (torch.bfloat16, torch.float32)
    CASES += [
        (fmt, bits, bits, head_dim, dtype, [129, 1, 128, 127])
        for fmt, bits, head_dim, dtype in product(("kivi", "rotated", "spectral"), (2, 3, 4, 8), (64, 96, 128, 256), dtypes)
    ]


def random_cache(head_dim, dtype, lengths=LENGTHS, seed=0):
    """Keys, strided as a projection leaves them, and values [2, 2, 130, D]; and rows of four runs of two heads."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 130, 2, head_dim, generator=generator).transpose(1, 2)
    keys[..., 5] *= 200
    values = torch.randn(2, 2, 130, head_dim, generator=generator)
    values[0, 0, 3] = 0
    kept = [torch.randperm(130, generator=generator)[:n].sort().values + 130 * pair for pair, n in enumerate(lengths)]
    return keys.to(dtype), values.to(dtype), torch.cat(kept), torch.arange(4, dtype=torch.int32)


@pytest.fixture
def packed_by_kernels(device):
    """A packed part that the kernels made, on the CPU. Keys go in strided, and everything between poisoned surroundings."""

    def make(fmt, keys, values, rows, lengths, pairs, key_bits, value_bits, fitted=None):
        tokens = (keys.to(device), values.to(device), rows.to(device))
        runs = (lengths.to(device), pairs.to(device))
        kept = fitted and Sides({"centre": fitted.keys["centre"].to(device)}, {})
        made = quantize_pack(fmt, *tokens, *runs, key_bits, value_bits, kept, backend="triton")
        return PackedTokens(made).to("cpu").packed

    return make


@pytest.fixture
def unpacked_by_kernels(guard):
    return lambda packed: tuple(x.cpu() for x in unpack_tokens(guard(packed), "triton"))


def assert_same(kernels, plain):
    for a, b in ((kernels.keys, plain.keys), (kernels.values, plain.values)):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert torch.equal(a[name].view(torch.int16), b[name].view(torch.int16)), name


@pytest.mark.parametrize(("fmt", "key_bits", "value_bits", "head_dim", "dtype", "lengths"), CASES)
def test_bits_are_those_of_the_format(
    packed_by_kernels, unpacked_by_kernels, fmt, key_bits, value_bits, head_dim, dtype, lengths
):
    keys, values, rows, pairs = random_cache(head_dim, dtype, lengths)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    kernels = packed_by_kernels(fmt, keys, values, rows, lengths, pairs, key_bits, value_bits)
    flat_keys, flat_values = (x.reshape(-1, head_dim)[rows] for x in (keys, values))
    tensors = PackedTokens.pack(fmt, flat_keys, flat_values, lengths, key_bits, value_bits).tensors()
    names = [f"keys.{name}" for name in kernels.keys] + [f"values.{name}" for name in kernels.values]
    for name, tensor in zip(names, [*kernels.keys.values(), *kernels.values.values()]):
        assert torch.equal(tensor, tensors[name]), name
    assert_same(kernels, quantize_pack(fmt, keys, values, rows, lengths, pairs, key_bits, value_bits))
    for unpacked, expected in zip(unpacked_by_kernels(kernels), unpack_tokens(kernels)):
        assert torch.equal(unpacked, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_trip_is_within_half_a_step(packed_by_kernels, unpacked_by_kernels, bits):
    keys, values, rows, pairs = random_cache(32, torch.float32)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    packed = packed_by_kernels("kivi", keys, values, rows, lengths, pairs, bits, bits)
    restored_keys, restored_values = unpacked_by_kernels(packed)
    group = torch.cat([torch.arange(n) // 32 + first for n, first in zip(LENGTHS, [0, 2, 2, 3])])
    key_error = (restored_keys - keys.reshape(-1, 32)[rows]).abs() / packed.keys["scale"].float()[group]
    value_error = (restored_values - values.reshape(-1, 32)[rows]).abs() / packed.values["scale"].float()
    assert key_error.max() <= 0.501 and value_error.max() <= 0.501


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN is cast to a code before its scale makes it NaN again
@pytest.mark.parametrize(("fmt", "bits"), [("kivi", 4), ("spectral", 3), *(("rotated", bits) for bits in (2, 3, 4, 8))])
def test_saturation_and_nan_stay_where_they_are(packed_by_kernels, fmt, bits):
    keys, values, rows, pairs = random_cache(32, torch.float32)
    keys[0, 0, :, 1], values[0, 0, :, 1] = 1e9, torch.inf
    keys[1, 0, :, 2], values[1, 1, :, 3] = -torch.inf, -1e30
    keys[1, 1, 10:, 4], values[1, 1, 20:, 4] = torch.nan, torch.nan
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    arguments = (fmt, keys, values, rows, lengths)
    kernels = unpack_tokens(packed_by_kernels(*arguments, pairs, bits, bits))
    plain = unpack_tokens(quantize_pack(*arguments, pairs, bits, bits))
    for a, b in zip(kernels, plain):
        assert b.isnan().any() and not b.isnan().all()
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def test_a_given_centre_is_kept(packed_by_kernels):
    keys, values, rows, pairs = random_cache(32, torch.bfloat16)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    fitted = Sides({"centre": torch.randn(4, 32).to(torch.float16)}, {})
    kernels = packed_by_kernels("rotated", keys, values, rows, lengths, pairs, 4, 4, fitted)
    assert_same(kernels, quantize_pack("rotated", keys, values, rows, lengths, pairs, 4, 4, fitted))


@pytest.mark.parametrize("max_tokens", [16, 33, 300])
def test_centre_of_a_sample(packed_by_kernels, monkeypatch, max_tokens):
    monkeypatch.setattr(rotated_reference, "CENTRE_TOKENS", max_tokens)
    monkeypatch.setattr(rotated_kernels, "CENTRE_TOKENS", max_tokens)
    lengths = [129, 0, 33, 128]
    keys, values, rows, pairs = random_cache(16, torch.bfloat16, lengths)
    arguments = ("rotated", keys, values, rows, torch.tensor(lengths, dtype=torch.int32), pairs, 4, 4)
    assert_same(packed_by_kernels(*arguments), quantize_pack(*arguments))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(16, torch.float16), (48, torch.float32), (80, torch.bfloat16), (128, torch.float32), (256, torch.float16)],
)
def test_steps_of_tokens_of_all_sizes_and_tails(packed_by_kernels, head_dim, dtype, bits):
    """From what rounds to 0 to what saturates: each step that may be chosen is, and loses what it loses in plain torch."""
    lengths = [33, 0, 1, 7]
    keys, values, rows, pairs = random_cache(head_dim, torch.float32, lengths)
    generator = torch.Generator().manual_seed(1)
    sizes = 10 ** (torch.rand(2, 2, 130, 1, generator=generator) * 14 - 9)
    tails = torch.randn(2, 2, 130, head_dim, generator=generator).abs() ** -0.5
    keys, values = ((x * sizes * tails).clamp(-65504, 65504).to(dtype) for x in (keys, values))
    arguments = ("rotated", keys, values, rows, torch.tensor(lengths, dtype=torch.int32), pairs, bits, bits)
    assert_same(packed_by_kernels(*arguments), quantize_pack(*arguments))


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("fmt", ["kivi", "rotated"])
def test_sizes_of_programs_do_not_show(packed_by_kernels, unpacked_by_kernels, monkeypatch, fmt, size):
    monkeypatch.setattr(rotated_kernels, "TOKENS", size)
    monkeypatch.setattr(kivi_kernels, "GROUPS", size // 16)
    keys, values, rows, pairs = random_cache(32, torch.bfloat16)
    arguments = (fmt, keys, values, rows, torch.tensor(LENGTHS, dtype=torch.int32), pairs, 4, 4)
    kernels = packed_by_kernels(*arguments)
    assert_same(kernels, quantize_pack(*arguments))
    for unpacked, expected in zip(unpacked_by_kernels(kernels), unpack_tokens(kernels)):
        assert torch.equal(unpacked, expected)


@pytest.mark.parametrize("fmt", ["kivi", "rotated", "spectral"])
def test_nothing_to_pack(packed_by_kernels, unpacked_by_kernels, fmt):
    keys, values, _, pairs = random_cache(32, torch.bfloat16)
    lengths, rows = torch.zeros(4, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)
    kernels = packed_by_kernels(fmt, keys, values, rows, lengths, pairs, 2, 3)
    assert_same(kernels, quantize_pack(fmt, keys, values, rows, lengths, pairs, 2, 3))
    assert all(part.shape == (0, 32) for part in unpacked_by_kernels(kernels))


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers that are read, and results whose size depends on numbers."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, tolist = 0, torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: self.read() or tolist(tensor))

    def read(self):
        self.count += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(function)
        unsized = "repeat_interleave" in name and kwargs.get("output_size") is None
        masked = name.startswith(("aten.index.", "aten.index_put")) and any(
            x.dtype == torch.bool for x in args[1] if x is not None
        )
        if unsized or masked or "_local_scalar_dense" in name or "nonzero" in name:
            self.read()
        return function(*args, **kwargs)


@pytest.mark.parametrize("fmt", ["kivi", "rotated"])
def test_packing_waits_for_the_device_once_and_appending_twice(device, monkeypatch, fmt):
    keys, values, rows, pairs = (x.to(device) for x in random_cache(32, torch.bfloat16))
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    with Reads(monkeypatch) as reads:
        packed = quantize_pack(fmt, keys, values, rows, lengths, pairs, 4, 4, backend="triton")
    assert reads.count == 1
    tokens = PackedTokens(packed, backend="triton")
    more = torch.randn(40, 32, device=device)
    with Reads(monkeypatch) as reads:
        tokens.unpack()
    assert reads.count == 0
    with Reads(monkeypatch) as reads:
        tokens.append(more, more, torch.tensor([20, 0, 15, 5], dtype=torch.int32, device=device))
    assert reads.count == 2
