"""Which ranked tokens a tier takes, against tokens that are dealt one tier after the other."""

from fractions import Fraction

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ib_analysis.cache.tiers import ranks, taken, tier_counts, tier_edges

untimed = settings(deadline=None)

MAX_TOKENS = 300


@st.composite
def token_shares(draw):
    """Exact shares of up to four tiers, together at most 1."""
    denominator = draw(st.integers(1, 64))
    left, shares = denominator, []
    for _ in range(draw(st.integers(0, 4))):
        shares.append(draw(st.integers(0, left)))
        left -= shares[-1]
    return [Fraction(share, denominator) for share in shares]


def dealt(shares, ranked):
    """The ranked tokens that each tier takes: from the front, its share of what the tiers before it left."""
    hands, left, left_share = [], list(ranked), Fraction(1)
    for share in shares:
        take = int(len(left) * share / left_share) if left_share else 0
        hands.append(left[:take])
        left, left_share = left[take:], left_share - share
    return hands


@untimed
@given(token_shares(), st.integers(0, MAX_TOKENS))
def test_tiers_take_what_they_are_dealt(shares, tokens):
    ranked = list(range(tokens))
    edges = tier_edges([float(share) for share in shares], tokens)
    assert [ranked[begin:end] for begin, end in zip(edges, edges[1:])] == dealt(shares, ranked)
    assert len(edges) == len(shares) + 1 and edges[0] == 0 and edges[-1] <= tokens


@untimed
@given(token_shares(), st.integers(0, MAX_TOKENS), st.integers(0, MAX_TOKENS))
def test_newcomers_fill_the_tiers_to_what_all_tokens_are_dealt(shares, first, second):
    before, tokens = sorted((first, second))
    held, all_held = ([len(hand) for hand in dealt(shares, range(count))] for count in (before, tokens))
    edges = tier_edges([float(share) for share in shares], tokens, before)
    assert np.diff(edges).tolist() == [after - old for old, after in zip(held, all_held)]
    assert edges == sorted(edges) and edges[0] == 0 and edges[-1] <= tokens - before


@untimed
@given(token_shares(), st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=5))
def test_counts_of_many_lengths_at_once_are_those_of_each(shares, lengths):
    shares = [float(share) for share in shares]
    before, tokens = np.sort(np.array(lengths), 1).T
    counts, edges = tier_counts(shares, tokens), tier_edges(shares, tokens, before)
    for i in range(len(lengths)):
        assert [count[i] for count in counts] == tier_counts(shares, int(tokens[i]))
        assert [edge[i] for edge in edges] == tier_edges(shares, int(tokens[i]), int(before[i]))


@st.composite
def scored_tokens(draw):
    """Scores [B, H, T], many of them alike, some infinite, and which tokens are ranked [B, 1, T]."""
    batch, heads, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 12))
    values = st.sampled_from([-torch.inf, torch.finfo(torch.float32).min, -1.0, 0.0, 0.5, 1.0, torch.inf])
    scores = draw(st.lists(values, min_size=batch * heads * tokens, max_size=batch * heads * tokens))
    mask = draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens))
    return torch.tensor(scores).reshape(batch, heads, tokens), torch.tensor(mask).reshape(batch, 1, tokens)


@untimed
@given(scored_tokens())
def test_ranks_are_places_in_the_order_of_scores(scored):
    """Of equal scores the earlier token comes first; -inf is the lowest of scores, yet before all that is not ranked."""
    scores, ranked = scored
    found = ranks(scores, ranked)
    lowest = torch.finfo(scores.dtype).min
    for b, row in enumerate(scores.tolist()):
        for h, head in enumerate(row):
            mask = ranked[b, 0].tolist()
            order = sorted(range(len(head)), key=lambda t: (not mask[t], -max(head[t], lowest) if mask[t] else 0, t))
            assert [found[b, h, t].item() for t in order] == list(range(len(head)))


def test_what_is_ranked_may_be_one_mask_for_all():
    scores = torch.tensor([[0.0, 3.0, 2.0, 1.0], [5.0, -torch.inf, 1.0, 1.0]])
    assert ranks(scores, torch.tensor([False, True, True, True])).tolist() == [[3, 0, 1, 2], [3, 2, 0, 1]]


def test_ranking_leaves_the_scores_as_they_are():
    scores = torch.tensor([1.0, -torch.inf, 2.0])
    before = scores.clone()
    ranks(scores, torch.tensor([True, True, False]))
    assert torch.equal(scores, before)


@untimed
@given(scored_tokens(), token_shares())
def test_tiers_take_the_positions_of_their_ranks_in_order(scored, shares):
    scores, ranked = scored
    ranked = ranked[:1]  # the same tokens in every sequence: as many are taken of each
    found = ranks(scores, ranked)
    edges = tier_edges([float(share) for share in shares], int(ranked.sum()))
    for begin, end in zip(edges, edges[1:]):
        positions = taken(found, begin, end)
        assert positions.shape == (*scores.shape[:-1], end - begin)
        for row, place in zip(positions.flatten(0, 1).tolist(), found.flatten(0, 1).tolist()):
            assert row == [t for t, rank in enumerate(place) if begin <= rank < end]
            assert all(ranked[0, 0, t] for t in row)
