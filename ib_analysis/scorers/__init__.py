"""Which tokens matter? A new scorer is one file and one row in SCORERS."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from ib_analysis.errors import UnknownNameError
from ib_analysis.scorers.blend import Blend
from ib_analysis.scorers.compactor import Compactor
from ib_analysis.scorers.criticalkv import CriticalKV
from ib_analysis.scorers.expected_attention import ExpectedAttention
from ib_analysis.scorers.h2o import h2o
from ib_analysis.scorers.keydiff import keydiff
from ib_analysis.scorers.knorm import knorm
from ib_analysis.scorers.kvgrad import KVgrad
from ib_analysis.scorers.kvzip import KVzip
from ib_analysis.scorers.learned import Learned
from ib_analysis.scorers.random_order import RandomOrder
from ib_analysis.scorers.repetition import RereadingScorer
from ib_analysis.scorers.scorer import Scorer
from ib_analysis.scorers.snapkv import SnapKV
from ib_analysis.scorers.streaming_llm import streaming_llm
from ib_analysis.scorers.tova import tova
from ib_analysis.scorers.value_aware import ValueAware

SCORERS: dict[str, Scorer] = {
    "value_aware": ValueAware(),
    "snapkv": SnapKV(),
    "streaming_llm": streaming_llm,
    "blend": Blend(),
    "compactor": Compactor(),
    "criticalkv": CriticalKV(),
    "expected_attention": ExpectedAttention(),
    "h2o": h2o,
    "keydiff": keydiff,
    "knorm": knorm,
    "kvgrad": KVgrad(),
    "kvzip": KVzip(),
    "learned": Learned(),
    "random": RandomOrder(),
    "tova": tova,
}
DEFAULT = "learned"  # which docs/scorers.md compares with the others


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
    """The registered scorer with other values of its fields, which may be scorers in turn."""
    scorer = SCORERS[name]
    known = _fields(scorer)
    unknown = [key for key in values if key not in known]
    if unknown:
        raise UnknownNameError(f"scorer {name!r} has no {unknown[0]!r}: its fields are {', '.join(known) or 'none'}")
    made: Scorer = type(scorer)(**{key: get_scorer(value) if callable(known[key]) else value for key, value in values.items()})
    return made


def _fields(scorer: Scorer) -> dict[str, Any]:
    """Its fields and their values; none of a function."""
    return {field.name: getattr(scorer, field.name) for field in fields(scorer)} if is_dataclass(scorer) else {}


def scorer_name(scorer: Scorer) -> str:
    """The name of its kind in the registry; of one that is in none, what Python calls it."""
    alike = (name for name, known in SCORERS.items() if known == scorer or (_fields(scorer) and type(known) is type(scorer)))
    return next(alike, str(getattr(scorer, "__name__", scorer)))


def scorer_to_json(scorer: Scorer) -> str | dict[str, Any]:
    """The name of a registered scorer, with its fields where they are not those of the registry.

    Raises UnknownNameError for a scorer that is not registered: who reads it could not know what it is.
    """
    for name, known in SCORERS.items():
        if known == scorer:
            return name
        if is_dataclass(scorer) and not isinstance(scorer, type) and type(known) is type(scorer):
            values = {key: scorer_to_json(value) if callable(value) else value for key, value in _fields(scorer).items()}
            return {"name": name, **values}
    raise UnknownNameError(
        f"{scorer!r} has no name to be saved under: add it to ib_analysis.scorers.SCORERS, as SCORERS['mine'] = scorer"
    )


__all__ = ["DEFAULT", "SCORERS", "RereadingScorer", "Scorer", "get_scorer", "scorer_name", "scorer_to_json"]
