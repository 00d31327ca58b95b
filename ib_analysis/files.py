"""Files that are whole or absent, and that say so when they have been cut or edited."""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ib_analysis.errors import CalibrationError, CorruptFileError, IBAnalysisError

LEFT_SECONDS = 3600  # after which a file that nobody finished is taken for one that a kill has left
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def expanded(path: str | Path) -> Path:
    """A path whose ~ no shell has expanded, as in Python or behind `--out=`. Raises IBAnalysisError if there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise IBAnalysisError(
            f"there is no home folder for {path}: write the path in full, or ./ before a name with ~"
        ) from error


def make_folder(folder: Path) -> None:
    """Makes the folder. Raises IBAnalysisError if nothing could be written there: better before the work than after."""
    folder = expanded(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
        raise IBAnalysisError(f"cannot write to folder {folder}: {reason}, pass another") from error
    if not os.access(folder, os.W_OK):
        raise IBAnalysisError(f"cannot write to folder {folder}: it is read-only, pass another")


def read_prompts(path: Path) -> list[str | list[dict[str, Any]]]:
    """The texts, and the conversations (lists of messages), of a JSON-lines file, blank lines left out.

    A line is {"text": ...} or {"messages": [...]}; of both, the text. Raises CalibrationError, with the line, for anything else.
    """
    prompts = []
    path = expanded(path)
    try:
        text = decoded(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read prompts from {path}: {error}; they are JSON lines in UTF-8 or UTF-16") from error
    for number, line in enumerate(text.split("\n"), 1):  # other breaks may be part of a text
        if line.strip():
            prompts.append(_read_prompt(line, f"line {number} of {path}"))
    return prompts


def decoded(content: bytes) -> str:
    """Text in UTF-8, or in UTF-16 with a byte order mark, whatever the machine's own encoding is. Raises UnicodeDecodeError."""
    return content.decode("utf-16" if content[:2] in UTF16 else "utf-8-sig")


def check_unicode(text: str, name: str) -> None:
    """Raises CalibrationError for text that no tokenizer reads: it has half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(f"{name} is no valid Unicode, half an emoji say: {error}") from error


def _read_prompt(line: str, name: str) -> str | list[dict[str, Any]]:
    try:
        row = json.loads(line)
        prompt: str | list[dict[str, Any]] = row["text"] if "text" in row else row["messages"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CalibrationError(f'{name} is not {{"text": ...}} or {{"messages": [...]}}') from error
    if "text" in row and not isinstance(prompt, str):
        raise CalibrationError(f"{name} has a text of type {type(prompt).__name__}")
    if "text" not in row and not (isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)):
        raise CalibrationError(f'{name} has messages that are no list of {{"role": ..., "content": ...}}')
    check_unicode(json.dumps(prompt, ensure_ascii=False), name)
    return prompt


def check_writable(path: Path) -> None:
    """Makes the folder of `path`; raises OSError if no file can be written there, for callers with long work ahead."""
    path = expanded(path)
    _make_folder(path)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes to a temporary file beside `path` and renames it: a kill leaves the old file or the new one.

    Raises OSError, with the path, where there is no room. What killed processes left is removed when it is an hour old.
    """
    path = expanded(path)
    _make_folder(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(OSError):  # another process may be as quick
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                left.unlink()
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"{error.strerror}, so this file was not written", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _make_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)


def sealed_json(content: dict[str, Any]) -> str:
    """JSON text of `content` with a checksum."""
    return json.dumps({**content, "checksum": _checksum(content)}, indent=1, allow_nan=False) + "\n"


def read_sealed_json(text: str, name: str) -> dict[str, Any]:
    """The content of `sealed_json`. Raises CorruptFileError if the text was cut or edited."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{name} is no complete JSON ({error}): write it again") from error
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise CorruptFileError(f"{name} was changed after it was written (its checksum is wrong): write it again")
    return content


def number_from_json(value: float | None) -> float:
    """A float; null, which stands for what JSON cannot write, is NaN."""
    return float("nan") if value is None else value


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """A safetensors file whose metadata holds `header` and a checksum of everything."""
    seal = sealed_json({**header, "sealed": _digests(tensors)})
    write_whole(path, lambda partial: partial.write_bytes(save(tensors, metadata={"header": seal})))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of `save_tensors`. Raises CorruptFileError if the file was cut or edited."""
    path = expanded(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise CorruptFileError(f"{path} is no complete safetensors file ({error}): write it again") from error
    if "header" not in metadata:
        raise CorruptFileError(f"{path} was not written by this package: it has no header")
    header = read_sealed_json(metadata["header"], str(path))
    sealed, contents = header.pop("sealed", None), header.pop("tensors", None)  # files of older versions seal contents alone
    if sealed != _digests(tensors) and (sealed is not None or contents != _content_digests(tensors)):
        raise CorruptFileError(f"the tensors of {path} were changed after they were written: write it again")
    return tensors, header


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    kinds = {name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for name, tensor in tensors.items()}
    return {name: f"{kinds[name]} {digest}" for name, digest in _content_digests(tensors).items()}


def _content_digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
        for name, tensor in sorted(tensors.items())
    }
