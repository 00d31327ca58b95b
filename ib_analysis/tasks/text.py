"""Natural text: an excerpt of a held-out module of Python's standard library, to be continued."""

from __future__ import annotations

import json
import random
from functools import cache
from itertools import pairwise

from tokenizers import Tokenizer

from ib_analysis.errors import CalibrationError
from ib_analysis.model.bundled import HELD_OUT, MODEL
from ib_analysis.tasks.prompt import Prompt

CHARACTERS_PER_TOKEN = 4  # more than the text has on average, so that an excerpt is long enough
TAIL_TOKENS = 32
TAIL_SHARE = 1 / 8


@cache
def held_out_documents() -> tuple[str, ...]:
    with open(HELD_OUT, encoding="utf-8") as file:
        return tuple(json.loads(line)["text"] for line in file)


@cache
def embedded_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def line_starts(document: str, room: int) -> list[int]:
    """Where lines start that `room` characters follow."""
    return [0] + [place + 1 for place, mark in enumerate(document[: len(document) - room]) if mark == "\n"]


def text(rng: random.Random, length: int) -> Prompt:
    """An excerpt from the start of a line on, in at most `length` tokens of the embedded tokenizer.

    The answer is its tail: the last 32 tokens, at most an eighth. Both ends are cut between words.
    """
    room = CHARACTERS_PER_TOKEN * length
    documents = [document for document in held_out_documents() if len(document) >= room]
    if not documents:
        longest = max(map(len, held_out_documents())) // CHARACTERS_PER_TOKEN
        raise CalibrationError(f"no held-out text has {length} tokens: ask for at most {longest}")
    document = rng.choices(documents, weights=[len(document) for document in documents])[0]
    start = rng.choice(line_starts(document, room))
    excerpt = document[start : start + room]
    encoding = embedded_tokenizer().encode(excerpt, add_special_tokens=False)
    starts = [  # of the tokens that begin a word: there, both sides keep their tokens when they are encoded apart
        (token, encoding.offsets[token][0])
        for token in range(1, len(encoding))
        if encoding.word_ids[token] != encoding.word_ids[token - 1]
    ]
    tail_tokens = min(TAIL_TOKENS, int(length * TAIL_SHARE))
    end_token, end = max(  # the last word is no longer than an answer may be
        pair for before, pair in pairwise(starts) if pair[0] <= length and pair[0] - before[0] <= tail_tokens
    )
    _, tail = min(pair for pair in starts if pair[0] >= end_token - tail_tokens)
    return Prompt("text", excerpt[:tail], (("", excerpt[tail:end]),))
