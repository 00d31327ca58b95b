"""Prompts: what the model is asked, made by generators. One file a task; `TASKS` is the registry."""

from collections.abc import Callable
from random import Random

from ib_analysis.tasks.copying import copying
from ib_analysis.tasks.frequency import frequency
from ib_analysis.tasks.needles import needles
from ib_analysis.tasks.prompt import Prompt
from ib_analysis.tasks.retrieval import retrieval
from ib_analysis.tasks.text import text

TASKS: dict[str, Callable[[Random, int], Prompt]] = {
    "retrieval": retrieval,
    "needles": needles,
    "copying": copying,
    "frequency": frequency,
    "text": text,
}

__all__ = ["TASKS", "Prompt"]
