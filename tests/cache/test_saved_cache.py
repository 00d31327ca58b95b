"""A saved cache answers as the one that it was saved from, to the bit, and files of other models or contents are refused."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ib_analysis.cache.attention import cache_argument, use_attention
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.plan import EVICTED, Recent
from ib_analysis.errors import CorruptFileError, ProfileMismatchError
from ib_analysis.files import load_tensors, save_tensors
from tests.cache.test_compressed import ARCHITECTURES, compressing_plans, padded_batch, small_model, spec_of


@torch.no_grad()
def answers(model, cache, ids, mask):
    steps = []
    for t in range(28, 40):
        inputs = {"input_ids": ids[:, t : t + 1], "attention_mask": mask[:, : t + 1]}
        steps.append(model(**inputs, **cache_argument(model, cache)).logits)
    return torch.cat(steps, 1)


@torch.no_grad()
def filled(model, spec, plans, batch=3):
    use_attention(model)
    ids, mask = padded_batch(batch)
    cache = CompressedCache(spec, plans)
    model(ids[:, :28], attention_mask=mask[:, :28], **cache_argument(model, cache))
    return cache, ids, mask


@pytest.mark.parametrize("quantized", [0, 9])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_answers_as_the_cache_it_was_saved_from(name, quantized, tmp_path):
    """Through several flushes of the window, with padding, in models with sliding windows, too."""
    model = small_model(name)
    spec = spec_of(model, Recent(2, 4, 4, quantized))
    cache, ids, mask = filled(model, spec, compressing_plans(spec))
    cache.save(tmp_path / "cache", model)
    found = CompressedCache.load(tmp_path / "cache", model)
    assert found.nbytes == cache.nbytes and found.get_seq_length() == 28
    expected = answers(model, cache, ids, mask)
    assert torch.equal(answers(model, found, ids, mask), expected)
    again = CompressedCache.load(tmp_path / "cache", model)
    again.reorder_cache(torch.tensor([2, 0, 1]))
    torch.testing.assert_close(answers(model, again, ids[[2, 0, 1]], mask[[2, 0, 1]]), expected[[2, 0, 1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plans", ["compressing", "some layers", "evicted", "full"])
def test_of_16_bit_models_with_any_plans(dtype, plans, tmp_path):
    model = small_model("llama").to(dtype)
    spec = spec_of(model, Recent(2, 4, 4, 5))
    rows = compressing_plans(spec)
    chosen = {
        "compressing": rows,
        "some layers": (rows[0], None, rows[2]),
        "evicted": spec.uniform(EVICTED),
        "full": spec.full_plans,
    }[plans]
    cache, ids, mask = filled(model, spec, chosen, batch=1)
    cache.save(tmp_path / "cache", model)
    expected = answers(model, cache, ids, mask)
    assert torch.equal(answers(model, CompressedCache.load(tmp_path / "cache", model), ids, mask), expected)


def test_a_cache_that_was_never_filled(tmp_path):
    model = small_model("llama")
    spec = spec_of(model)
    CompressedCache(spec, compressing_plans(spec)).save(tmp_path / "cache", model)
    found = CompressedCache.load(tmp_path / "cache", model)
    assert found.get_seq_length() == 0 and found.nbytes == 0


@torch.no_grad()
def test_a_cache_without_a_token_at_16_bits(tmp_path):
    model = small_model("llama")
    for quantized in (0, 5):
        spec = spec_of(model, Recent(0, 4, 4, quantized))
        cache, ids, _ = filled(model, spec, compressing_plans(spec), batch=1)
        cache.crop(-4)
        assert cache.layers[0].keys.shape[2] == 0
        cache.save(tmp_path / "cache", model)
        found = CompressedCache.load(tmp_path / "cache", model)
        assert found.get_seq_length() == 24 and found.nbytes == cache.nbytes
        logits = [model(ids[:, 24:28], **cache_argument(model, one)).logits for one in (cache, found)]
        assert torch.equal(*logits)


def test_the_file_is_as_large_as_the_cache(tmp_path):
    """And some kilobytes of names, beside the bases of keys."""
    model = small_model("llama")
    spec = spec_of(model)
    cache, _, _ = filled(model, spec, compressing_plans(spec))
    cache.save(tmp_path / "cache", model)
    assert spec.bases is not None
    assert cache.nbytes < (tmp_path / "cache").stat().st_size - spec.bases.nbytes < cache.nbytes + 40_000


def test_what_is_no_cache_of_this_model_is_refused(tmp_path):
    model = small_model("llama")
    spec = spec_of(model)
    cache, _, _ = filled(model, spec, compressing_plans(spec))
    path = tmp_path / "cache"
    cache.save(path, model)
    with pytest.raises(ProfileMismatchError, match="other config"):
        CompressedCache.load(path, small_model("qwen2"))
    other = small_model("llama")
    other.lm_head.weight.data += 1
    with pytest.raises(ProfileMismatchError, match="other weights"):
        CompressedCache.load(path, other)
    with pytest.raises(ProfileMismatchError, match="other dtype"):
        CompressedCache.load(path, small_model("llama").half())
    with pytest.raises(ProfileMismatchError, match="not one of this Qwen3ForCausalLM"):
        cache.save(tmp_path / "other", small_model("qwen3"))
    with pytest.raises(FileNotFoundError):
        CompressedCache.load(tmp_path / "none", model)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptFileError):
        CompressedCache.load(path, model)
    path.write_bytes(content)
    tensors, header = load_tensors(path)
    for changed in (
        ({name: tensor for name, tensor in tensors.items() if name != "layers.1.values"}, header),
        ({**tensors, "layers.0.packed.0.lengths": tensors["layers.0.packed.0.lengths"][:1]}, header),
        (tensors, {**header, "layers": header["layers"][:1]}),
        (tensors, {**header, "plans": [None, None, None]}),
        (tensors, {**header, "version": 2}),
        (tensors, {name: value for name, value in header.items() if name != "weights"}),
    ):
        save_tensors(path, *changed)
        with pytest.raises(ProfileMismatchError):
            CompressedCache.load(path, model)


def changed_files(tensors, header):
    """(what was changed, tensors, header), each sealed right but no cache's."""
    for name, tensor in tensors.items():
        if name.startswith("bases."):
            continue
        if not name.endswith("sink_mask"):  # without one, all have their sinks
            yield f"{name} left out", {key: value for key, value in tensors.items() if key != name}, header
        for said, other in (("cut", tensor[:-1]), ("longer", torch.cat([tensor, tensor[:1]])), ("cast", tensor.double())):
            yield f"{name} {said}", {**tensors, name: other.contiguous()}, header
        if name.endswith(("lengths", "pairs")):
            yield f"{name} moved", {**tensors, name: tensor.roll(1) + 1}, header
    yield "a tensor more", {**tensors, "layers.0.other": torch.zeros(1)}, header
    for layer, numbers in enumerate(header["layers"]):
        for name, number in numbers.items():
            for other in (None, "3", -1, 10**12, 1.5, [], [1, 2, 3, 4]):
                layers = [*header["layers"][:layer], {**numbers, name: other}, *header["layers"][layer + 1 :]]
                if other != number:
                    yield f"{name} of layer {layer} is {other!r}", tensors, {**header, "layers": layers}
    for name in ("shape", "recent", "scorer", "plans", "layers"):
        for other in (None, 3, "x", [], {}, [None]):
            yield f"{name} is {other!r}", tensors, {**header, name: other}


def test_contents_that_are_no_cache_s_are_refused_whatever_the_checksum(tmp_path):
    model = small_model("llama")
    spec = spec_of(model, Recent(2, 4, 4, 9))
    cache, _, _ = filled(model, spec, compressing_plans(spec))
    path = tmp_path / "cache"
    cache.save(path, model)
    taken = []
    for said, tensors, header in changed_files(*load_tensors(path)):
        save_tensors(path, tensors, header)
        try:
            CompressedCache.load(path, model)
        except ProfileMismatchError:
            continue
        taken.append(said)
    assert not taken, taken


@torch.no_grad()
def test_an_interrupted_cache_is_not_saved(tmp_path):
    model = small_model("llama")
    spec = spec_of(model)
    cache, _, _ = filled(model, spec, compressing_plans(spec))
    cache.layers[1].changing = True
    with pytest.raises(ValueError, match="interrupted"):
        cache.save(tmp_path / "cache", model)
    assert not list(tmp_path.iterdir())
    cache.layers[1].changing = False
    unknown = CompressedCache(replace(spec, scorer=lambda *_: None), compressing_plans(spec))
    with pytest.raises(Exception, match="scorer"):
        unknown.save(tmp_path / "cache", model)


READ = """
import sys, torch
import ib_analysis as ib
model, _ = ib.load()
cache = ib.CompressedCache.load(sys.argv[1], model)
with torch.no_grad():
    logits = [model(torch.tensor([[token]]), **ib.cache_argument(model, cache)).logits for token in range(5, 45)]
torch.save(torch.cat(logits, 1), sys.argv[2])
"""


@pytest.mark.slow
@torch.no_grad()
def test_another_process_answers_the_same(tmp_path):
    import ib_analysis as ib

    model, _ = ib.load()
    use_attention(model)
    spec = spec_of(model, Recent(2, 4, 4, 12))
    cache = CompressedCache(spec, compressing_plans(spec))
    model(torch.arange(10, 210)[None], **cache_argument(model, cache))
    cache.save(tmp_path / "cache", model)
    subprocess.run([sys.executable, "-c", READ, tmp_path / "cache", tmp_path / "logits"], check=True)
    found = torch.load(tmp_path / "logits", weights_only=True)
    logits = [model(torch.tensor([[token]]), **cache_argument(model, cache)).logits for token in range(5, 45)]
    assert torch.equal(found, torch.cat(logits, 1))
