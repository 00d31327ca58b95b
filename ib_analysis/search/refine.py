"""Measured moves around the knapsack's solution, all heads compressed together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ib_analysis.cache.spec import ByteLimit
from ib_analysis.errors import BudgetError
from ib_analysis.replay.replays import Replays
from ib_analysis.search.knapsack import solve
from ib_analysis.search.profile import Profile
from ib_analysis.search.worth_measuring import FIRST_PROMPTS, spread

NEIGHBOURS = 6  # options of each head that are measured around the joint solution
MAX_MOVES = 64  # of a round: those of the least reduced cost, where there are many heads
ROUNDS = 2
TINY_BITS = 1e-9


def refine(profile: Profile, replays: Replays, limit: ByteLimit, choice: NDArray[np.int64]) -> NDArray[np.int64]:
    """Moves around a joint solution, measured with all other heads compressed as they are in it.

    In each round, every head's most promising options by reduced cost are measured in place of the chosen one on a few prompts,
    and the knapsack is solved again with these losses. A round that does not lower the loss measured on all prompts ends it.
    The interaction between heads, which single-head losses miss, matters most at tight budgets. Nothing is tried that exceeds
    the limit, or its share at a longer context.
    """
    nbytes = profile.nbytes()
    best = choice
    best_loss = _joint_loss(profile, replays, [best])[0]
    for _ in range(ROUNDS):
        pairs = _promising(profile, nbytes, best)
        moved = [_with(best, head, option) for head, option in pairs]
        losses = np.full(profile.loss_bits.shape, np.inf)
        by_move = _joint_loss(profile, replays, [best, *moved], spread(len(replays), FIRST_PROMPTS))
        losses[np.arange(len(best)), best] = by_move[0]
        losses[tuple(np.array(pairs).T)] = by_move[1:]
        feasible = [m for m in moved if nbytes[np.arange(len(m)), m].sum() <= limit.spare]
        singles = sorted(feasible, key=lambda m: losses[_changed(best, m)])
        single = next(([m] for m in singles if limit.excess(profile.plans(m)) == 0), [])
        tried = [*_solved(profile, losses, limit), *single]
        if not tried:
            break
        found = _joint_loss(profile, replays, tried)
        if found.min() >= best_loss - TINY_BITS:
            break
        best, best_loss = tried[int(found.argmin())], float(found.min())
    return best


def _solved(profile: Profile, losses: NDArray[np.float64], limit: ByteLimit) -> list[NDArray[np.int64]]:
    """The choice of least loss [1]; none if only options are measured that exceed the budget at some length."""
    try:
        solution, _ = profile.solve_at_all_lengths(limit, lambda lowered: profile.solve(lowered, losses))
    except BudgetError:
        return []
    return [solution.choice]


def _changed(before: NDArray[np.int64], after: NDArray[np.int64]) -> tuple[int, int]:
    head = int(np.flatnonzero(before != after)[0])
    return head, int(after[head])


def _joint_loss(
    profile: Profile, replays: Replays, choices: list[NDArray[np.int64]], numbers: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Measured loss in bits per predicted token of each choice, all heads together, on these prompts or all."""
    kl_bits, _ = replays.measure([profile.plans(choice) for choice in choices], "measuring jointly", numbers)
    means: NDArray[np.float64] = kl_bits.mean(0)
    return means


def _promising(profile: Profile, nbytes: NDArray[np.int64], choice: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(head, option) of the least reduced cost, loss + multiplier * bytes, at the multiplier around the chosen solution."""
    losses = profile.expected_bits
    multiplier = _multiplier(losses, nbytes, choice)
    reduced = losses + multiplier * nbytes
    reduced[np.arange(len(choice)), choice] = np.inf
    chosen = losses[np.arange(len(choice)), choice]
    pairs = []
    for head in range(len(choice)):
        pairs += [(head, int(option)) for option in np.argsort(reduced[head], kind="stable")[:NEIGHBOURS]]
    excess = reduced - (chosen + multiplier * nbytes[np.arange(len(choice)), choice])[:, None]  # above what is chosen
    return sorted(sorted(pairs, key=lambda pair: excess[pair])[:MAX_MOVES])


def _multiplier(losses: NDArray[np.float64], nbytes: NDArray[np.int64], choice: NDArray[np.int64]) -> float:
    """Loss saved per byte by the next step along the hulls, around the bytes that the choice takes."""
    used = int(nbytes[np.arange(len(choice)), choice].sum())
    step = max(1, used // 20)
    lower = solve(list(losses), list(nbytes), max(used - step, int(nbytes.min(1).sum())), gap=0.1)
    upper = solve(list(losses), list(nbytes), used + step, gap=0.1)
    return max(0.0, (lower.loss - upper.loss) / max(1, upper.cost - lower.cost))


def _with(choice: NDArray[np.int64], head: int, option: int) -> NDArray[np.int64]:
    moved = choice.copy()
    moved[head] = option
    return moved
