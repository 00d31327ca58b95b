"""Which tokens matter? A new scorer is one file and one row in SCORERS."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass
from typing import Any

from ib_analysis.errors import UnknownNameError
from ib_analysis.scorers.scorer import Scorer
from ib_analysis.scorers.snapkv import SnapKV
from ib_analysis.scorers.streaming_llm import streaming_llm
from ib_analysis.scorers.value_aware import ValueAware

SCORERS: dict[str, Scorer] = {"value_aware": ValueAware(), "snapkv": SnapKV(), "streaming_llm": streaming_llm}


def get_scorer(given: object) -> Scorer:
    """The scorer of a name, the scorer that is given, or the one that `scorer_to_json` described.

    Raises UnknownNameError for anything else.
    """
    values: dict[str, Any] = {}
    if isinstance(given, dict):
        values = {key: value for key, value in given.items() if key != "name"}
        given = given.get("name")
    if isinstance(given, str) and given in SCORERS:
        return _with_fields(given, values) if values else SCORERS[given]
    if not callable(given) or isinstance(given, type):
        raise UnknownNameError(f"there is no scorer {given!r}: use one of {', '.join(SCORERS)}, or pass a scorer itself")
    scorer: Scorer = given
    return scorer


def _with_fields(name: str, values: dict[str, Any]) -> Scorer:
    """The registered scorer with other values of its fields."""
    scorer = SCORERS[name]
    known: list[str] = [field.name for field in fields(scorer)] if is_dataclass(scorer) else []
    unknown = [key for key in values if key not in known]
    if unknown:
        raise UnknownNameError(f"scorer {name!r} has no {unknown[0]!r}: its fields are {', '.join(known) or 'none'}")
    made: Scorer = type(scorer)(**values)
    return made


def scorer_to_json(scorer: Scorer) -> str | dict[str, Any]:
    """The name of a registered scorer, with its fields where they are not those of the registry.

    Raises UnknownNameError for a scorer that is not registered: who reads it could not know what it is.
    """
    for name, known in SCORERS.items():
        if known == scorer:
            return name
        if is_dataclass(scorer) and not isinstance(scorer, type) and type(known) is type(scorer):
            return {"name": name, **asdict(scorer)}
    raise UnknownNameError(
        f"{scorer!r} has no name to be saved under: add it to ib_analysis.scorers.SCORERS, as SCORERS['mine'] = scorer"
    )


__all__ = ["SCORERS", "Scorer", "get_scorer", "scorer_to_json"]
