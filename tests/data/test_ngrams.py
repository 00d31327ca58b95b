"""The counting models: proper distributions, and equal to the formula worked out with dictionaries."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from ngrams import grams, kneser_ney, unigram

BEGIN, VOCABULARY = 1, 7
DOCUMENTS = [[3, 4, 5, 3, 4, 6, 3, 4, 5], [5, 3, 4, 5, 5, 6], [6], []]


def windows_after(history: list[int]) -> np.ndarray:
    """Every token of the vocabulary behind one history: [vocabulary, len(history) + 1]."""
    return np.array([[*history, token] for token in range(VOCABULARY)])


def by_hand(documents: list[list[int]], history: tuple[int, ...], token: int, order: int) -> float:
    """The probability from Chen and Goodman's equations, with one dictionary a level."""
    counts: dict[int, Counter[tuple[int, ...]]] = {order: Counter()}
    for document in documents:
        padded = [BEGIN] * (order - 1) + document
        counts[order].update(tuple(padded[i : i + order]) for i in range(len(document)))
    for size in range(order - 1, 0, -1):
        before = defaultdict(set)
        for gram in counts[size + 1]:
            before[gram[1:]].add(gram[0])
        counts[size] = Counter({gram: len(tokens) for gram, tokens in before.items()})
    probability = 1 / VOCABULARY
    for size in range(1, order + 1):
        behind = {gram: count for gram, count in counts[size].items() if gram[:-1] == history[len(history) - size + 1 :]}
        if not behind:
            continue
        once, twice = (sum(count == n for count in counts[size].values()) for n in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.5
        kept = max(behind.get((*history[len(history) - size + 1 :], token), 0) - discount, 0)
        probability = (kept + discount * len(behind) * probability) / sum(behind.values())
    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_formula(order):
    model = kneser_ney(DOCUMENTS, VOCABULARY, order, BEGIN)
    for longest in [[BEGIN] * 4, [BEGIN, 3, 4, 5], [3, 4, 5, 3], [6, 6, 6, 6], [0, 2, 3, 4], [4, 5, 5, 6]]:
        history = longest[5 - order :]
        expected = [by_hand(DOCUMENTS, tuple(history), token, order) for token in range(VOCABULARY)]
        np.testing.assert_allclose(model.probability(windows_after(history)), expected, rtol=1e-12)


def test_sums_to_one_behind_seen_and_unseen_histories():
    random = np.random.default_rng(0)
    documents = [random.integers(0, 2000, size).tolist() for size in (5000, 1, 300)]
    documents += [documents[0][:3000]]  # so that some n-grams occur twice
    model = kneser_ney(documents, 2040, 5, BEGIN)
    seen = documents[0][100:104]
    for history in (seen, [2039] * 4, [2039, 2038, *seen[2:]], [BEGIN] * 4):
        probability = model.probability(np.array([[*history, token] for token in range(2040)]))
        assert probability.min() > 0
        assert probability.sum() == pytest.approx(1, abs=1e-12)
    assert unigram(documents, 2040).sum() == pytest.approx(1, abs=1e-12)


def test_a_seen_continuation_is_likely():
    model = kneser_ney([[2, 3, 4, 5, 6] * 50], VOCABULARY, 5, BEGIN)
    assert model.probability(np.array([[3, 4, 5, 6, 2]]))[0] > 0.9
    assert model.probability(np.array([[3, 4, 5, 6, 4]]))[0] < 0.05


def test_grams_do_not_cross_documents():
    found = grams(DOCUMENTS[1:], 3, BEGIN)
    assert found.shape == (7, 3)
    assert found[0].tolist() == [1, 1, 5]
    assert found[-1].tolist() == [1, 1, 6]


def test_unigram_counts_with_one_added():
    assert unigram([[2, 2, 3]], 4).tolist() == [1 / 7, 1 / 7, 3 / 7, 2 / 7]


def test_too_large_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="64 bits"):
        kneser_ney(DOCUMENTS, 2049, 5, BEGIN)
