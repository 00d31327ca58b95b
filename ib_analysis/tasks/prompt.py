"""What the model is asked: a context that may be compressed, then questions with their answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A context, then turns of (question, answer).

    Only the context is compressible. The first question may be shown to the scorer (question-aware) or not.
    `depth_share` is where the first needle lies, from 0 (start of the context) to 1 (its end).
    `chance` is the probability that a guesser who has read the format, but not the values, answers right.
    """

    task: str
    context: str
    turns: tuple[tuple[str, str], ...]
    chance: float = 0.0
    depth_share: float = 0.0

    @property
    def question(self) -> str:
        return self.turns[0][0]

    @property
    def answer(self) -> str:
        return self.turns[0][1]

    @property
    def text(self) -> str:
        return self.context + "".join(question + answer for question, answer in self.turns)
