"""List copy: a list somewhere among filler, to be said again."""

from __future__ import annotations

import random

from ib_analysis.tasks.prompt import Prompt
from ib_analysis.tasks.words import WORDS, count_words, scatter


def copying(rng: random.Random, length: int) -> Prompt:
    """A list of 8 to 48 different words. Chance: one of the list's words at random."""
    size = rng.randint(8, max(8, min(48, length // 8)))
    words = " ".join(rng.sample(WORDS, size))
    line = f"List: {words}\n"
    context = scatter(rng, [line], length - size - 3)
    depth = count_words(context[: context.index(line)]) / count_words(context)
    return Prompt("copying", context, (("List:", f" {words}\n"),), chance=1 / size, depth_share=depth)
