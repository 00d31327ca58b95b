"""Key-value retrieval: pairs among filler, and a question about one of them."""

from __future__ import annotations

import random

from ib_analysis.tasks.prompt import Prompt
from ib_analysis.tasks.words import WORDS, count_words, scatter

QUESTION_WORDS = 2  # "Find", the key
TURN_WORDS = QUESTION_WORDS + 2  # the value, the end of the line


def pairs_prompt(rng: random.Random, length: int, pairs: int, questions: int, task: str) -> Prompt:
    """`pairs` lines "- key value" among filler, then `questions` lines "Find key value", in `length` words."""
    words = rng.sample(WORDS, 2 * pairs)
    keys, values = words[:pairs], words[pairs:]
    lines = [f"- {key} {value}\n" for key, value in zip(keys, values)]
    context = scatter(rng, lines, length - questions * TURN_WORDS)
    asked = rng.sample(range(pairs), questions)
    turns = tuple((f"Find {keys[i]}", f" {values[i]}\n") for i in asked)
    depth = count_words(context[: context.index(lines[asked[0]])]) / count_words(context)
    return Prompt(task, context, turns, chance=1 / pairs, depth_share=depth)


def retrieval(rng: random.Random, length: int) -> Prompt:
    """8 to 24 pairs, one question. Chance: one of the values at random."""
    return pairs_prompt(rng, length, rng.randint(8, max(8, min(24, length // 16))), 1, "retrieval")
