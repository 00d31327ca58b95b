"""Files that were damaged, or changed and sealed again: each is what it was, something valid, or an error of this package.

`PYTHONPATH=. python tests/test_fuzz.py 10000` tries so many of each kind.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import ib_analysis as ib
from ib_analysis.cache.attention import cache_argument, use_attention
from ib_analysis.errors import IBAnalysisError
from ib_analysis.files import read_prompts, save_tensors, sealed_json
from ib_analysis.search.profile import Profile
from tests.conftest import random_llama

SECONDS, MEGABYTES = 5, 300  # that no file may take
NUMBERS = (None, True, -1, 0, 1, 2, 16, 0.5, -0.5, 1e308, 10**12, 10**30)
VALUES: tuple[object, ...] = (
    *NUMBERS,
    "",
    "x",
    "value_aware",
    "float64",
    [],
    {},
    [[]],
    {"format": "kivi"},
    json.loads("[" * 200 + "]" * 200),
)


class Case:
    """A file, and what reads it; `read` gives something that can be compared."""

    def __init__(self, path, read, sealed):
        self.path, self.read, self.sealed = path, read, sealed
        self.whole = path.read_bytes()
        self.answer = read(path)


def allocation_case(folder, model, allocation):
    path = folder / "allocation.json"
    allocation.to_json(path)
    return Case(path, lambda path: ib.Allocation.from_json(path).to_json(), sealed=True)


def profile_case(folder, model, allocation):
    path = folder / "profile.safetensors"

    def read(path):
        found = Profile.load(path)
        found.save(folder / "again")
        return (folder / "again").read_bytes()

    return Case(path, read, sealed=True)


def cache_case(folder, model, allocation):
    path = folder / "cache.safetensors"
    cache = allocation.cache(model)
    with torch.no_grad():
        model(torch.randint(3, 64, (2, 60)), **cache_argument(model, cache))
    cache.save(path, model)

    def read(path):
        with torch.no_grad():
            loaded = ib.CompressedCache.load(path, model)
            return model(torch.tensor([[5], [6]]), **cache_argument(model, loaded)).logits.tolist()

    return Case(path, read, sealed=True)


def prompts_case(folder, model, allocation):
    path = folder / "prompts.jsonl"
    lines = [{"text": "Ein Text, ein Wort: é 😀"}, {"messages": [{"role": "user", "content": "Hello"}]}, {"text": "a\tb"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n" + json.dumps(lines[0], ensure_ascii=False))
    return Case(path, read_prompts, sealed=False)


def folder_case(folder, model, allocation):
    """A model's folder, of which the config is damaged."""
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")

    def read(path):
        loaded, _ = ib.load(str(path.parent))
        return str(loaded.config)

    return Case(folder / "model" / "config.json", read, sealed=False)


CASES = {
    "allocation": allocation_case,
    "profile": profile_case,
    "cache": cache_case,
    "prompts": prompts_case,
    "model": folder_case,
}


def damaged(whole, rng):
    """Bytes that were flipped, lost, doubled, inserted or cut off."""
    at, count = rng.randrange(len(whole)), rng.choice([1, 1, 1, 4, 100])
    head, cut, tail = whole[:at], whole[at : at + count], whole[at + count :]
    way = rng.choice(["flip", "digit", "lose", "double", "insert", "end"])
    if way == "flip":
        return head + bytes([cut[0] ^ 1 << rng.randrange(8)]) + cut[1:] + tail
    if way == "digit":
        return head + bytes(rng.choice(b'0123456789-.eE"[]{},:') for _ in cut) + tail
    if way == "insert":
        return head + rng.randbytes(count) + cut + tail
    return {"lose": head + tail, "double": head + cut + cut + tail, "end": head}[way]


def changed(content, rng):
    """A JSON value of which one part, anywhere, is another, is gone, or is there twice."""
    content = json.loads(json.dumps(content))
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        way = rng.choice(["value", "value", "value", "gone", "twice"])
        if way == "value":
            place[key] = rng.choice(VALUES)
        elif way == "gone":
            del place[key]
        elif isinstance(place, list):
            place.insert(key, place[key])
        else:
            place[f"{key}_"] = place[key]
        return content


def resealed(case, rng):
    """The content changed, with a checksum that is right: what is read next has to notice."""
    if case.path.suffix == ".json":
        content = json.loads(case.whole)
        content.pop("checksum")
        case.path.write_text(sealed_json(changed(content, rng)))
        return
    with safe_open(case.path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = json.loads(file.metadata()["header"])
    del header["checksum"], header["sealed"]
    if rng.random() < 0.6:
        header = changed(header, rng)
    else:
        name = rng.choice(list(tensors))
        tensor = tensors.pop(name)
        way = rng.choice(["gone", "cut", "cast", "flat", "other"])
        if way != "gone":
            other = {"cut": tensor[:-1], "cast": tensor.to(torch.float64), "flat": tensor.flatten(), "other": torch.zeros(3)}[way]
            tensors[name] = other.contiguous()
    save_tensors(case.path, tensors, header)


def tried(case, rng, reseals):
    """Damages the file, reads it, and puts it right again."""
    if reseals:
        resealed(case, rng)
    else:
        case.path.write_bytes(damaged(case.whole, rng))
    begin = time.monotonic()
    try:
        answer = case.read(case.path)
    except IBAnalysisError:
        pass
    else:
        assert reseals or not case.sealed or answer == case.answer, "a damaged file is read as another"
    finally:
        assert time.monotonic() - begin < SECONDS
        case.path.write_bytes(case.whole)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return materials(tmp_path_factory.mktemp("fuzz"))


def materials(folder):
    """(folder, model, allocation), with a profile in the folder."""
    model = random_llama()
    prompts = list(torch.randint(3, 64, (6, 128), generator=torch.Generator().manual_seed(0)))
    allocation = ib.optimal_allocation(model, 1 / 4, prompts=prompts, profile_path=folder / "profile.safetensors")
    use_attention(model)
    return folder, model, allocation


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_damaged_files_are_read_or_refused(made, name):
    fuzz(CASES[name](*made), 60 if name == "model" else 150)


def fuzz(case, count, show=False):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in tqdm(range(count), disable=not show):
        rng = Random(seed)
        try:
            tried(case, rng, reseals=case.sealed and seed % 2 == 1)
        except Exception as error:
            raise AssertionError(f"{case.path.name}, seed {seed}: {error!r}") from error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        of_all = materials(Path(folder))
        for kind, case in CASES.items():
            print(kind, flush=True)
            fuzz(case(*of_all), int(sys.argv[1]), show=True)
