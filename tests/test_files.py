"""Files are whole or absent, and a change is noticed; prompts are read line by line."""

import json
import os
from copy import deepcopy
from pathlib import Path

import pytest
import torch

import ib_analysis as ib
from ib_analysis.errors import CalibrationError, CorruptFileError, IBAnalysisError
from ib_analysis.files import (
    check_writable,
    load_tensors,
    make_folder,
    number_from_json,
    read_prompts,
    read_sealed_json,
    save_tensors,
    sealed_json,
    write_whole,
)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "folder" / "file"
    write_whole(path, lambda partial: partial.write_text("old"))

    def fail(partial):
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        write_whole(tmp_path, lambda partial: partial.write_text("new"))
    assert list(tmp_path.iterdir()) == [] and list(tmp_path.parent.glob("*.partial")) == []


def test_json_round_trip_and_tampering():
    text = sealed_json({"a": [1, 2.5], "b": None})
    assert read_sealed_json(text, "it") == {"a": [1, 2.5], "b": None}
    for broken in (text[:-5], text.replace("2.5", "2.6"), "[]", "", text.replace("checksum", "other")):
        with pytest.raises(CorruptFileError, match="it"):
            read_sealed_json(broken, "it")


def test_tensors_round_trip_and_tampering(tmp_path):
    path = tmp_path / "file.safetensors"
    tensors = {"x": torch.arange(6.0).view(2, 3), "flag": torch.tensor([True, False])}
    save_tensors(path, tensors, {"name": "n"})
    found, header = load_tensors(path)
    assert header == {"name": "n"}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    (tmp_path / "other").write_text("")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # safetensors' own are not readable by others
    content = path.read_bytes()
    for broken in (content[:-3], content[:20], b"", content[:-8] + bytes(8), content.replace(b'\\"n\\"', b'\\"m\\"')):
        assert broken != content
        path.write_bytes(broken)
        with pytest.raises(CorruptFileError, match=r"file\.safetensors"):
            load_tensors(path)


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "none")


def test_a_folder_is_made_with_those_above_it(tmp_path):
    folder = tmp_path / "a" / "b"
    make_folder(folder)
    make_folder(folder)  # that exists
    assert folder.is_dir() and list(folder.iterdir()) == []


def test_where_no_folder_can_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(IBAnalysisError, match=r"cannot write to folder .*file: it is a file, pass another"):
        make_folder(tmp_path / "file")
    with pytest.raises(IBAnalysisError, match=r"cannot write to folder .*file/below: .*, pass another"):
        make_folder(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "kept"
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode == os.W_OK))
    with pytest.raises(IBAnalysisError, match="it is read-only, pass another"):
        make_folder(tmp_path)


def test_a_place_for_long_work_is_looked_at_first(tmp_path):
    check_writable(tmp_path / "folder" / "file")
    assert list((tmp_path / "folder").iterdir()) == []
    (tmp_path / "file").write_text("kept")
    check_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="name a file in it" if path.is_dir() else "file"):
            check_writable(path)


def test_prompts_are_split_at_line_feeds_only(tmp_path):
    texts = ["one\u2028two\u0085three", "four\tfive", "six"]
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n\n".join(lines) + "\r\n  \n", encoding="utf-8", newline="")
    assert read_prompts(path) == texts


def test_a_line_may_be_a_conversation(tmp_path):
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    path = tmp_path / "prompts.jsonl"
    lines = [{"messages": messages, "source": "x"}, {"text": "three"}, {"text": "four", "messages": messages}, {"messages": []}]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert read_prompts(path) == [messages, "three", "four", []]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}", r'line 4 of .*prompts\.jsonl is not \{"text": \.\.\.\} or \{"messages": \[\.\.\.\]\}'),
        ('{"messages": "one"}', "line 4 of .* has messages that are no list"),
        ('{"messages": ["one"]}', "line 4 of .* has messages that are no list"),
        ('{"messages": {"role": "user"}}', "line 4 of .* has messages that are no list"),
        ("3", "line 4 of .* is not"),
        ('{"text": "cut', "line 4 of .* is not"),
        ("plain words", "line 4 of .* is not"),
        ('["text"]', "line 4 of .* is not"),
        ('"text"', "line 4 of .* is not"),
        ("null", "line 4 of .* is not"),
        ('{"text": 3}', "line 4 of .* has a text of type int"),
        ('{"text": null}', "line 4 of .* has a text of type NoneType"),
        ('{"text": "half an emoji \\ud83d"}', "line 4 of .* is no valid Unicode"),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "line 4 of .* is no valid Unicode"),
        ("[" * 100_000, "line 4 of .* is not"),
        ("9" * 10_000, "line 4 of .* is not"),
    ],
)
def test_a_line_that_is_no_prompt(line, said, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(['{"text": "one"}', "", '{"text": "two"}', line]), encoding="utf-8")
    with pytest.raises(CalibrationError, match=said):
        read_prompts(path)


def test_prompts_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\x80{}")
    for path in (tmp_path / "none", tmp_path, tmp_path / "binary"):
        with pytest.raises(CalibrationError, match=rf"cannot read prompts from .*{path.name}: "):
            read_prompts(path)
    (tmp_path / "empty").write_text("\n \n")
    assert read_prompts(tmp_path / "empty") == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_as_other_programs_write_them(encoding, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"text": "größer"}\r\n{"text": "two"}\r\n'.encode(encoding))
    assert read_prompts(path) == ["größer", "two"]


def test_prompts_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.jsonl").write_text('{"text": "one"}')
    assert read_prompts(Path("~/prompts.jsonl")) == ["one"]


def test_the_home_folder_is_meant_by_every_path(tmp_path, monkeypatch, shared_llama, small_prompts):
    """A ~ that no shell has expanded, as in Python, or behind `--out=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make_folder(Path("~/folder"))
    with pytest.warns(UserWarning, match="prompts calibrate"):
        allocation = ib.optimal_allocation(shared_llama, 1 / 4, prompts=small_prompts, profile_path="~/profile.safetensors")
    text = allocation.to_json("~/allocation.json")
    assert ib.Allocation.from_json("~/allocation.json").to_json() == text
    allocation.plot("~/folder/heads")
    assert ib.Profile.load("~/profile.safetensors").prompts == 4
    model = deepcopy(shared_llama)
    cache = allocation.cache(model)
    cache.save("~/cache.safetensors", model)
    assert ib.CompressedCache.load("~/cache.safetensors", model).get_seq_length() == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"folder", "profile.safetensors", "allocation.json", "cache.safetensors"}
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"heads.pdf", "heads.png", "heads.csv"}
    with pytest.raises(IBAnalysisError, match="there is no home folder for ~no such user"):
        allocation.to_json("~no such user/allocation.json")


@pytest.mark.parametrize("text", ['{"a": ' * 100_000, "[" * 100_000, '{"a": ' + "9" * 10_000 + "}"])
def test_json_that_is_too_deep_or_too_long_is_named(text):
    with pytest.raises(CorruptFileError, match=r"file\.json is no complete JSON"):
        read_sealed_json(text, "file.json")


def test_kinds_and_shapes_of_tensors_are_sealed(tmp_path):
    """Each letter of the table of tensors: no other is read as if it were right."""
    path = tmp_path / "tensors.safetensors"
    save_tensors(path, {"a": torch.arange(4, dtype=torch.float64), "b": torch.zeros(2, 2)}, {"version": 1})
    whole = path.read_bytes()
    tensors, header = load_tensors(path)
    table = whole.index(b'"a":')
    for place in range(table, 8 + int.from_bytes(whole[:8], "little")):
        for other in b"FI0123468,":
            path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
            try:
                found, _ = load_tensors(path)
            except CorruptFileError:
                continue
            assert {name: (t.dtype, t.tolist()) for name, t in found.items()} == {
                name: (t.dtype, t.tolist()) for name, t in tensors.items()
            }
    assert header == {"version": 1}


def test_null_is_no_number():
    assert number_from_json(0.0) == 0 and number_from_json(None) != number_from_json(None)
