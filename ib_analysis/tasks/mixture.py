"""The mixture of tasks that calibration and evaluation use by default."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from ib_analysis.errors import UnknownNameError
from ib_analysis.tasks import TASKS
from ib_analysis.tasks.prompt import Prompt

MIXTURE = ("retrieval", "needles", "copying", "frequency", "text")  # its own list: a new task changes no default


def mixture(seed: str, count: int, length: int, tasks: Sequence[str] = MIXTURE) -> list[Prompt]:
    """`count` prompts of about `length` tokens, the tasks in turn. Prompts of different seeds share nothing but words.

    Raises UnknownNameError for a task that is not in TASKS.
    """
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise UnknownNameError(f"there is no task {unknown[0]!r}: use some of {', '.join(TASKS)}")
    return [TASKS[tasks[i % len(tasks)]](Random(f"{seed} {i}"), length) for i in range(count)]
