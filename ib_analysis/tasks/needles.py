"""Several needles: one context must answer three questions, one after the other."""

from __future__ import annotations

import random

from ib_analysis.tasks.prompt import Prompt
from ib_analysis.tasks.retrieval import pairs_prompt


def needles(rng: random.Random, length: int) -> Prompt:
    """8 to 24 pairs, three questions. Chance: one of the values at random."""
    return pairs_prompt(rng, length, rng.randint(8, max(8, min(24, length // 16))), 3, "needles")
