"""A list to be said backwards: a task in one file."""

from random import Random

from ib_analysis.tasks import Prompt
from ib_analysis.tasks.words import WORDS, scatter


def reversal(rng: Random, length: int) -> Prompt:
    """8 words among filler. Chance: one of them at random."""
    words = rng.sample(WORDS, 8)
    context = scatter(rng, [f"List: {' '.join(words)}\n"], length - 12)
    return Prompt("reversal", context, (("Backwards:", f" {' '.join(reversed(words))}\n"),), chance=1 / 8)
