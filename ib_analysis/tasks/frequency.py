"""Most frequent word: votes among filler, and the question who won."""

from __future__ import annotations

import random

from ib_analysis.tasks.prompt import Prompt
from ib_analysis.tasks.words import WORDS, count_words, scatter


def frequency(rng: random.Random, length: int) -> Prompt:
    """4 to 8 candidates; the winner has at least half as many votes again as the second. Chance: one candidate at random."""
    candidates = rng.sample(WORDS, rng.randint(4, 8))
    most = rng.randint(4, max(4, min(9, length // 32)))
    votes = [candidates[0]] * most
    for candidate in candidates[1:]:
        votes += [candidate] * rng.randint(1, max(1, most * 2 // 3))
    rng.shuffle(votes)
    lines = []
    while votes:
        row, votes = votes[:5], votes[5:]
        lines.append(f"Votes: {' '.join(row)}\n")
    context = scatter(rng, lines, length - 5)
    winner_at = context.index(" " + candidates[0])
    depth = count_words(context[:winner_at]) / count_words(context)
    turns = (("Most votes:", f" {candidates[0]}\n"),)
    return Prompt("frequency", context, turns, chance=1 / len(candidates), depth_share=depth)
