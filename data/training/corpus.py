"""The natural text: documentation topics and source files of Python's standard library, whole modules held out."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__", "encodings"}
HELD_OUT_SHARE = 1 / 16


def held_out(module: str) -> bool:
    """Whether a top-level module or documentation topic is held out: decided by its name alone."""
    return hashlib.sha256(module.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def documents() -> list[tuple[str, str]]:
    """(top-level module or topic, text), in a fixed order: the same on every machine with the same Python."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    found = [(f"topic {name}", text) for name, text in sorted(topics.items())]
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        text = path.read_text(encoding="utf-8", errors="replace")
        if not LEFT_OUT & set(parts) and text.strip():
            found.append((parts[0], text))
    return found


def split() -> tuple[list[str], list[str]]:
    """Training texts and held-out texts. No module or topic is in both."""
    texts: tuple[list[str], list[str]] = ([], [])
    for module, text in documents():
        texts[held_out(module)].append(text)
    return texts
