"""What every storage format promises, and that one defined here, without kernels, needs nothing else."""

import logging
from dataclasses import replace

import pytest
import torch
from ib_kernels import FORMATS, Format, MetadataRows, PackedTokens, Window, backends, packed_attention, quantize_pack, ragged
from ib_kernels.backends import VARIABLE, pick_backend
from ib_kernels.formats import get_kernels
from ib_kernels.testing import check_format


class Offset:
    """One scale a token, about an offset that a run keeps from its first tokens."""

    def metadata(self, head_dim):
        return {"scale": MetadataRows(1), "offset": MetadataRows(head_dim, tokens_per_row=0)}

    def fit(self, x, lengths):
        padded, _ = ragged.pad(x, lengths)
        return {"offset": (padded.sum(1) / lengths.clamp(min=1)[:, None]).half()}

    def quantize(self, x, lengths, bits, fitted):
        centred = x - fitted["offset"].float()[ragged.run_of_row(lengths, x.shape[0])]
        scale = (centred.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)).clamp(min=1e-6).half()
        codes = (centred / scale.float() + (2**bits - 1) / 2).round().clamp(0, 2**bits - 1)
        return codes.to(torch.uint8), {"scale": scale, "offset": fitted["offset"]}

    def dequantize(self, codes, metadata, lengths, bits):
        centred = (codes.float() - (2**bits - 1) / 2) * metadata["scale"].float()
        return centred + metadata["offset"].float()[ragged.run_of_row(lengths, codes.shape[0])]


OFFSET = Format("offset", Offset(), Offset())


@pytest.fixture
def offset(monkeypatch):
    monkeypatch.setitem(FORMATS, "offset", OFFSET)
    backends._plain_torch.cache_clear()


@pytest.mark.parametrize("fmt", [*FORMATS.values(), OFFSET], ids=lambda fmt: fmt.name)
def test_keeps_its_promises(fmt):
    check_format(fmt)
    assert (fmt.name in FORMATS) == (fmt is not OFFSET)


def test_what_was_fitted_survives_append(offset):
    """On keys and on values, whatever it is called."""
    first, more = torch.randn(8, 16) + 5, torch.randn(8, 16) - 5
    packed = PackedTokens.pack("offset", first, 2 * first, torch.tensor([8]), 8, 8)
    packed.append(more, 2 * more, torch.tensor([8]))
    keys, values = packed.unpack()
    assert (keys[:8] - first).abs().max() < 0.05
    assert (values[:8] - 2 * first).abs().max() < 0.1


def broken(name, make):
    """The format above with another function, made from its own."""
    quantizer = Offset()
    setattr(quantizer, name, make(getattr(quantizer, name)))
    return Format("broken", quantizer, Offset())


def forgetful(quantize):
    return lambda x, lengths, bits, fitted: quantize(x, lengths, bits, Offset().fit(x, lengths))


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        (broken("quantize", forgetful), "appending changes offset of keys"),
        (
            broken("quantize", lambda f: lambda *a: (f(*a)[0].int(), f(*a)[1])),
            "keys of broken with head_dim 8: codes .* uint8",
        ),
        (broken("quantize", lambda f: lambda *a: (f(*a)[0] | 128, f(*a)[1])), "a code of 2 bits is"),
        (broken("quantize", lambda f: lambda *a: (f(*a)[0], {"scale": f(*a)[1]["scale"]})), r"metadata is \['scale'\]"),
        (broken("fit", lambda f: lambda *a: {}), r"fit gives \[\]"),
        (broken("dequantize", lambda f: lambda *a: f(*a) / 0), "no finite fp32"),
        (broken("dequantize", lambda f: lambda *a: f(*a) * 0), "of the variance"),
        (broken("metadata", lambda f: lambda d: {**f(d), "words": MetadataRows(1)}), "'words'"),
        (Format("kivi", Offset(), Offset()), "another format called 'kivi'"),
    ],
    ids=["forgets", "codes", "range", "metadata", "fit", "finite", "error", "words", "name"],
)
def test_broken_promises_are_found(fmt, message):
    with pytest.raises(AssertionError, match=message):
        check_format(fmt)
    assert "broken" not in FORMATS


def test_a_group_that_cannot_be_completed_is_found():
    kivi = FORMATS["kivi"]
    with pytest.raises(AssertionError, match="quantizing decoded tokens again"):
        check_format(Format("mixed", kivi.keys, FORMATS["rotated"].values))


@pytest.mark.parametrize("where", ["a GPU", "a GPU, IB_KERNELS=triton", "the interpreter"])
def test_without_kernels_all_runs_in_plain_torch_and_says_so_once(offset, monkeypatch, caplog, where):
    """Asked for the kernels, as on a GPU: a launch would fail here."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(backends, "without_kernels", lambda device: None)
    if where != "a GPU":
        monkeypatch.setenv(VARIABLE, "triton")
    if where == "the interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = torch.device("cpu" if where == "the interpreter" else "cuda")
    assert pick_backend(device, 16, [("offset", 4, 4), ("kivi", 4, 4)]) == "reference"
    with monkeypatch.context() as patch:
        patch.setattr(backends, "default_backend", lambda device: "triton")
        keys, values = torch.randn(2, 1, 1, 9, 16)
        lengths, pairs = torch.tensor([9], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        packed = quantize_pack("offset", keys, values, torch.arange(9), lengths, pairs, 4, 4, backend="triton")
        tokens = PackedTokens(packed, backend="triton")
        tokens.append(keys[0, 0], values[0, 0], torch.tensor([9]))
        assert tokens.unpack()[0].shape == (18, 16)
        window = Window(*torch.randn(2, 1, 3, 16))
        out, _ = packed_attention(torch.randn(1, 2, 16), [packed], window, 0.25)
        assert out.isfinite().all()
    assert len([r for r in caplog.records if r.levelno == logging.WARNING and "'offset' has no kernels" in r.getMessage()]) == 1


def test_only_formats_with_kernels_have_them(offset):
    assert get_kernels("kivi").scales == "groups" and get_kernels("rotated").rotates
    with pytest.raises(ValueError, match="no GPU kernels"):
        get_kernels("offset")
    assert replace(OFFSET, kernels=get_kernels("kivi")).kernels is not None


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.kernels is not None])
def test_a_module_of_kernels_has_all_functions(name):
    pytest.importorskip("triton")
    module = get_kernels(name).load()
    assert all(callable(getattr(module, function)) for function in ("pack", "unpack", "queries"))
