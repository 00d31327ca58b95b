"""A mixture of all tasks, the prompts that calibration and evaluation use by default."""

from __future__ import annotations

from random import Random

from ib_analysis.tasks import TASKS
from ib_analysis.tasks.prompt import Prompt


def mixture(seed: str, count: int, length: int) -> list[Prompt]:
    """`count` prompts of about `length` tokens, the tasks in turn. Prompts of different seeds share nothing but words."""
    names = list(TASKS)
    return [TASKS[names[i % len(names)]](Random(f"{seed} {i}"), length) for i in range(count)]
