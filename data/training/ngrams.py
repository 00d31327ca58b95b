"""Language models that count: unigrams, and n-grams with interpolated Kneser-Ney smoothing (Chen and Goodman, 1999)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOKEN_BITS = 11  # of a token id: five tokens fit into one int64
NO_SINGLES_DISCOUNT = 0.5  # where nothing occurs once, so that what was never seen keeps some probability

Tokens = NDArray[np.int64]


def grams(documents: Iterable[list[int]], order: int, begin_token: int) -> Tokens:
    """Each token of each document behind the `order` - 1 tokens before it, begin tokens where there are none: [N, order]."""
    windows = []
    for document in documents:
        padded = np.array([begin_token] * (order - 1) + document, dtype=np.int64)
        if document:
            windows.append(np.lib.stride_tricks.sliding_window_view(padded, order))
    return np.concatenate(windows)


def codes(windows: Tokens) -> Tokens:
    """One number for each n-gram, the last token in its lowest bits: [N, n] -> [N]."""
    numbers = np.zeros(len(windows), dtype=np.int64)
    for column in windows.T:
        numbers = numbers << TOKEN_BITS | column
    return numbers


def lookup(table: Tokens, numbers: Tokens) -> tuple[Tokens, NDArray[np.bool_]]:
    """Where each number is in a sorted table, and whether it is there at all."""
    places = np.minimum(np.searchsorted(table, numbers), len(table) - 1)
    return places, table[places] == numbers


@dataclass(frozen=True)
class Level:
    """The n-grams of one length. A history is an n-gram without its last token."""

    grams: Tokens  # codes, sorted
    counts: Tokens
    histories: Tokens  # codes, sorted
    totals: Tokens  # of each history: the sum of its n-grams' counts
    followers: Tokens  # of each history: how many tokens were seen behind it

    @property
    def discount(self) -> float:
        """Ney's estimate, n1 / (n1 + 2 n2), where n1 n-grams occur once and n2 twice."""
        once, twice = int((self.counts == 1).sum()), int((self.counts == 2).sum())
        return once / (once + 2 * twice) if once else NO_SINGLES_DISCOUNT

    def probability(self, numbers: Tokens, lower: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of each n-gram's last token behind its history, given the probability from the shorter history: [N]."""
        place, known = lookup(self.grams, numbers)
        count = np.where(known, self.counts[place], 0)
        history, known = lookup(self.histories, numbers >> TOKEN_BITS)
        kept = np.maximum(count - self.discount, 0)
        given_away = self.discount * self.followers[history]
        return np.where(known, (kept + given_away * lower) / self.totals[history], lower)


def level(found: Tokens, counts: Tokens) -> Level:
    """The level of n-grams given as sorted, distinct codes."""
    histories, starts = np.unique(found >> TOKEN_BITS, return_index=True)
    return Level(found, counts, histories, np.add.reduceat(counts, starts), np.diff(starts, append=len(found)))


@dataclass(frozen=True)
class KneserNey:
    """Levels from unigrams up. Below the highest, an n-gram counts once for each token seen before it."""

    levels: tuple[Level, ...]
    vocabulary: int

    def probability(self, windows: Tokens) -> NDArray[np.float64]:
        """Of each window's last token behind the others: [N, order] -> [N]."""
        probability = np.full(len(windows), 1 / self.vocabulary)
        for size, found in enumerate(self.levels, 1):
            probability = found.probability(codes(windows[:, -size:]), probability)
        return probability


def kneser_ney(documents: Iterable[list[int]], vocabulary: int, order: int, begin_token: int) -> KneserNey:
    """Count documents of token ids below `vocabulary`, which hold no begin token themselves."""
    if vocabulary > 1 << TOKEN_BITS or order * TOKEN_BITS > 63:
        raise ValueError(f"{order}-grams of {vocabulary} tokens do not fit into 64 bits")
    found, counts = np.unique(codes(grams(documents, order, begin_token)), return_counts=True)
    levels = [level(found, counts)]
    for size in range(order - 1, 0, -1):
        found, counts = np.unique(found & ((1 << size * TOKEN_BITS) - 1), return_counts=True)
        levels.append(level(found, counts))
    return KneserNey(tuple(reversed(levels)), vocabulary)


def unigram(documents: Iterable[list[int]], vocabulary: int) -> NDArray[np.float64]:
    """The probability of each token, one added to its count: [vocabulary]."""
    counts = np.bincount(np.concatenate([np.array(document, dtype=np.int64) for document in documents]), minlength=vocabulary) + 1
    return counts / counts.sum()
