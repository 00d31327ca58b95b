"""Files are whole or absent, and a change is noticed."""

import pytest
import torch

from ib_analysis.errors import CorruptFileError
from ib_analysis.files import load_tensors, read_sealed_json, save_tensors, sealed_json, write_whole


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
