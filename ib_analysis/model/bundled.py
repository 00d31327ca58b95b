"""Where the model that ships with this package lies, and what lies beside it."""

from __future__ import annotations

from pathlib import Path

INSTALLED, CHECKOUT = (Path(__file__).parents[level] / "data" for level in (1, 2))
DATA = INSTALLED if INSTALLED.is_dir() else CHECKOUT  # a wheel carries the folder within the package
MODEL = DATA / "model"
HELD_OUT = DATA / "heldout.jsonl"
CARD = DATA / "README.md"

BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def measured(card: str) -> str:
    """The part of the model card that the evaluation program writes."""
    return card.split(BEGIN)[1].split(END)[0]


def with_measured(card: str, figures: str) -> str:
    """The model card with other figures."""
    before, after = card.split(BEGIN)[0], card.split(END)[1]
    return f"{before}{BEGIN}{figures}{END}{after}"
