"""The multiple-choice knapsack: one option per group, least total loss, total bytes within a limit.

Pareto front per group, lower convex hull, greedy fill by marginal loss per byte, a Lagrangian dual bound, and an
integer programme where that bound leaves a gap (Sinha and Zoltners 1979; Kellerer, Pferschy and Pisinger 2004, ch. 11).
Shapes: U groups, N Pareto options of all groups one after another, S steps between neighbours on the hulls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ib_analysis.errors import BudgetError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_LOSS = 1e200  # sums and products with bytes stay finite
MAX_NODES = 200  # of HiGHS' search tree: what ends it must not be a clock, or results differ from run to run
OBJECTIVE_SCALE = 1e4  # HiGHS stops at an absolute gap of 1e-6, whatever the losses


@dataclass(frozen=True, eq=False)
class Solution:
    """One option per group."""

    choice: Ints  # [U] index into the group's options
    loss: float  # total, in the unit of the losses
    cost: int  # total, bytes
    dual_bound: float  # no choice within the limit has a smaller total loss

    @property
    def gap(self) -> float:
        """Certified distance to the optimum, relative to the loss."""
        return (self.loss - self.dual_bound) / max(abs(self.loss), float(np.finfo(float).tiny))


@dataclass(frozen=True, eq=False)
class Curve:
    """The nested path from the cheapest choice to the best: point k has taken the first k steps.

    Each point is optimal at its own cost; between two points the dual bound is the straight line.
    """

    cost: Ints  # [S + 1] bytes, increasing
    loss: Floats  # [S + 1] decreasing
    multiplier: Floats  # [S] loss saved per byte by each step, not increasing
    group: Ints  # [S] the group that each step moves
    option: Ints  # [S] the option that it moves to
    first: Ints  # [U] the cheapest option of each group

    def choice(self, limit: int) -> Ints:
        """The options [U] of the last point whose cost is within `limit` bytes. Raises BudgetError below the first."""
        _require_feasible(limit, int(self.cost[0]))
        steps = int(np.searchsorted(self.cost, limit, side="right")) - 1
        choice = self.first.copy()
        choice[self.group[:steps]] = self.option[:steps]  # of repeated groups the last step counts
        return choice


@dataclass(frozen=True, eq=False)
class _Fronts:
    """Pareto options of every group: in a group the cost increases and the loss decreases, both strictly."""

    group: Ints  # [N]
    option: Ints  # [N]
    loss: Floats  # [N]
    cost: Ints  # [N]
    start: Ints  # [U] position of each group's cheapest option


@dataclass(frozen=True, eq=False)
class _Steps:
    """Steps along all hulls, steepest first; in a group they keep their order."""

    origin: Ints  # [S] position in the fronts
    target: Ints  # [S] position in the fronts
    multiplier: Floats  # [S] loss saved per byte


@dataclass(frozen=True, eq=False)
class _Bound:
    """The Lagrangian bound of a choice."""

    multiplier: float  # loss per byte
    excess: float  # how far the choice's loss is above the bound
    reduced: Floats  # [N] loss + multiplier * cost, above the least of the group


def solve(
    losses: Sequence[np.ndarray],
    costs: Sequence[np.ndarray],
    limit: int,
    *,
    gap: float = 1e-4,
    time_limit_s: float = 60.0,
) -> Solution:
    """Chooses one option per group: total cost at most `limit` bytes, total loss least up to the relative `gap`.

    `losses[u]` and `costs[u]` [O_u] are the losses, in any unit, and whole bytes of group u's options; an infinite loss
    forbids an option. If the certified gap of the greedy choice is above `gap`, HiGHS looks for a better one and
    tightens the bound, in 200 nodes of its search tree, seconds; `time_limit_s` ends it where that takes too long.
    Raises BudgetError if the cheapest choice exceeds the limit; ValueError if a loss is NaN or minus infinity, or a
    group has no allowed option.
    """
    fronts = _pareto_fronts(losses, costs)
    _require_feasible(limit, int(fronts.cost[fronts.start].sum()))
    chosen, multiplier = _greedy(fronts, _hull_steps(fronts), limit)
    bound = _certify(fronts, chosen, multiplier, limit)
    loss = float(fronts.loss[chosen].sum())
    dual_bound = loss - bound.excess
    target = gap * abs(loss)
    if bound.excess > target:
        refined, excess = _refine(fronts, chosen, bound, limit, target, time_limit_s)
        dual_bound = loss - excess
        chosen = min(chosen, refined, key=lambda positions: float(fronts.loss[positions].sum()))
        loss = float(fronts.loss[chosen].sum())
    return Solution(fronts.option[chosen], loss, int(fronts.cost[chosen].sum()), min(dual_bound, loss))


def curve(losses: Sequence[np.ndarray], costs: Sequence[np.ndarray]) -> Curve:
    """The greedy choice at every limit, nested; arguments and errors as in `solve`."""
    fronts = _pareto_fronts(losses, costs)
    steps = _hull_steps(fronts)
    saved = fronts.loss[steps.origin] - fronts.loss[steps.target]  # [S]
    added = fronts.cost[steps.target] - fronts.cost[steps.origin]  # [S]
    final = np.append(fronts.start[1:], len(fronts.group)) - 1  # [U] each group's best option, the end of its hull
    # Summed backwards from the best choice: forwards, rounding errors of the first, large losses would swamp the last.
    above_best = np.append(np.cumsum(saved[::-1])[::-1], 0.0)
    return Curve(
        cost=fronts.cost[fronts.start].sum() + np.append(0, np.cumsum(added)),
        loss=fronts.loss[final].sum() + above_best,
        multiplier=steps.multiplier,
        group=fronts.group[steps.target],
        option=fronts.option[steps.target],
        first=fronts.option[fronts.start],
    )


def _require_feasible(limit: int, minimum: int) -> None:
    if limit < minimum:
        raise BudgetError(f"a budget of {limit:,} bytes is too small: the cheapest choice takes {minimum:,} bytes")


def _pareto_fronts(losses: Sequence[np.ndarray], costs: Sequence[np.ndarray]) -> _Fronts:
    if len(losses) != len(costs) or len(losses) == 0:
        raise ValueError(f"losses and costs have one array per group, at least one, not {len(losses)} and {len(costs)}")
    fronts = [_pareto(np.asarray(losses[u], dtype=float), np.asarray(costs[u]), u) for u in range(len(losses))]
    sizes = [len(front) for front in fronts]
    return _Fronts(
        group=np.repeat(np.arange(len(fronts)), sizes),
        option=np.concatenate(fronts),
        loss=np.concatenate([np.asarray(losses[u], dtype=float)[front] for u, front in enumerate(fronts)]),
        cost=np.concatenate([np.asarray(costs[u], dtype=np.int64)[front] for u, front in enumerate(fronts)]),
        start=np.cumsum([0, *sizes[:-1]]),
    )


def _pareto(loss: Floats, cost: NDArray[np.integer], group: int) -> Ints:
    """The options [F] that no other beats in cost and loss, by increasing cost; of equal options the first."""
    if loss.ndim != 1 or loss.shape != cost.shape or not np.issubdtype(cost.dtype, np.integer):
        found = f"{loss.shape} and {cost.shape} {cost.dtype}"
        raise ValueError(f"group {group}: losses and integer costs are arrays [O] of one length, not {found}")
    if not ((np.abs(loss) < MAX_LOSS) | (loss == np.inf)).all():
        raise ValueError(f"group {group}: a loss is NaN, minus infinity or not below {MAX_LOSS:g}")
    order = np.lexsort((loss, cost))
    order = order[loss[order] < np.inf]
    if len(order) == 0:
        raise ValueError(f"group {group} has no option with a finite loss")
    least = np.minimum.accumulate(loss[order])
    better = np.append(True, loss[order][1:] < least[:-1])
    front: Ints = order[better]
    return front


def _hull_steps(fronts: _Fronts) -> _Steps:
    edges = [*fronts.start.tolist(), len(fronts.group)]
    hulls = [a + _lower_hull(fronts.loss[a:b].tolist(), fronts.cost[a:b].tolist()) for a, b in pairwise(edges)]
    positions = np.concatenate(hulls)
    origin, target = positions[:-1], positions[1:]
    same = fronts.group[origin] == fronts.group[target]
    origin, target = origin[same], target[same]
    multiplier = (fronts.loss[origin] - fronts.loss[target]) / (fronts.cost[target] - fronts.cost[origin])
    order = np.argsort(-multiplier, kind="stable")
    return _Steps(origin[order], target[order], multiplier[order])


def _lower_hull(loss: list[float], cost: list[int]) -> Ints:
    """Corners [H] of the lower convex hull of one front (Graham's scan): the loss saved per byte decreases strictly."""
    hull = [0]
    multipliers: list[float] = []
    for i in range(1, len(loss)):
        multiplier = (loss[hull[-1]] - loss[i]) / (cost[i] - cost[hull[-1]])
        while multipliers and multiplier >= multipliers[-1]:
            hull.pop()
            multipliers.pop()
            multiplier = (loss[hull[-1]] - loss[i]) / (cost[i] - cost[hull[-1]])
        hull.append(i)
        multipliers.append(multiplier)
    return np.array(hull)


def _greedy(fronts: _Fronts, steps: _Steps, limit: int) -> tuple[Ints, float]:
    """Positions [U] of the greedy choice, and the multiplier of the first step that does not fit (0 if all fit)."""
    chosen = fronts.start.copy()
    left = limit - int(fronts.cost[chosen].sum())
    added = fronts.cost[steps.target] - fronts.cost[steps.origin]  # [S]
    taken = int(np.searchsorted(np.cumsum(added), left, side="right"))
    chosen[fronts.group[steps.target[:taken]]] = steps.target[:taken]
    multiplier = float(steps.multiplier[taken]) if taken < len(steps.multiplier) else 0.0
    _fill_along_hulls(fronts, steps, chosen, taken, limit)
    _fill_with_any(fronts, chosen, limit)
    return chosen, multiplier


def _fill_along_hulls(fronts: _Fronts, steps: _Steps, chosen: Ints, taken: int, limit: int) -> None:
    """Takes, in order, the later steps that fit; a group whose step does not fit stays where it is."""
    left = limit - int(fronts.cost[chosen].sum())
    added = fronts.cost[steps.target] - fronts.cost[steps.origin]
    for s in taken + np.flatnonzero(added[taken:] <= left):
        group = fronts.group[steps.target[s]]
        if added[s] <= left and chosen[group] == steps.origin[s]:
            chosen[group] = steps.target[s]
            left -= int(added[s])


def _fill_with_any(fronts: _Fronts, chosen: Ints, limit: int) -> None:
    """Spends what is left on single moves to any Pareto option, the largest saving first."""
    while True:
        left = limit - fronts.cost[chosen].sum()
        saved = fronts.loss[chosen[fronts.group]] - fronts.loss  # [N]
        saved[fronts.cost - fronts.cost[chosen[fronts.group]] > left] = 0.0
        best = int(np.argmax(saved))
        if saved[best] <= 0:
            return
        chosen[fronts.group[best]] = best


def _certify(fronts: _Fronts, chosen: Ints, multiplier: float, limit: int) -> _Bound:
    """The bound sum_u min_o (L + m c) - m * limit, greatest at the multiplier m of the first step that does not fit.

    All is taken relative to the choice: rounding errors are then those of the excess, not of the losses.
    """
    at = chosen[fronts.group]  # [N]
    relative = fronts.loss - fronts.loss[at] + multiplier * (fronts.cost - fronts.cost[at])
    least = np.minimum.reduceat(relative, fronts.start)  # [U] at most 0
    excess = multiplier * (limit - fronts.cost[chosen].sum()) - least.sum()
    return _Bound(multiplier, float(excess), relative - least[fronts.group])


def _refine(fronts: _Fronts, chosen: Ints, bound: _Bound, limit: int, target: float, time_limit_s: float) -> tuple[Ints, float]:
    """The best choice [U] that HiGHS finds, and its bound on how far the given choice is above the optimum.

    The loss above the Lagrangian bound is the sum of the reduced losses + multiplier * unused bytes, so an option whose
    reduced loss is above the given choice's excess cannot improve on it; the few that remain make a small programme.
    """
    kept = np.flatnonzero(bound.reduced <= bound.excess * (1 + 1e-9))  # [K]
    group = fronts.group[kept]
    minimum = np.minimum.reduceat(fronts.cost[kept], np.searchsorted(group, np.arange(len(chosen))))  # [U]
    added = fronts.cost[kept] - minimum[group]  # [K]
    unit = max(1, int(np.gcd.reduce(added)))
    spare, remainder = divmod(limit - int(minimum.sum()), unit)
    # The last column counts the unused bytes, in units; where one already exceeds the excess, its multiplier may be capped.
    # An inequality without this column is solved faster, but HiGHS then often prints debugging lines to stdout.
    objective = np.append(bound.reduced[kept], min(bound.multiplier * unit, 2 * bound.excess)) / bound.excess
    objective[:-1] += group == 0  # a constant, so that HiGHS' relative gap is an absolute one
    columns = np.arange(len(kept))
    pick_one = csr_array((np.ones(len(kept)), (group, columns)), shape=(len(chosen), len(kept) + 1))
    spend = csr_array(np.append(added // unit, 1.0)[None])
    result = milp(
        objective * OBJECTIVE_SCALE,
        integrality=np.append(np.ones(len(kept)), 0),
        bounds=Bounds(0, np.append(np.ones(len(kept)), np.inf)),
        constraints=[LinearConstraint(pick_one, 1, 1), LinearConstraint(spend, spare, spare)],
        options={
            "node_limit": MAX_NODES,
            "time_limit": time_limit_s,
            "mip_rel_gap": target / (2 * bound.excess),
            "presolve": False,  # it saves no time here, and prints debugging lines to stdout now and then
        },
    )
    if result.status not in (0, 1) or result.mip_dual_bound is None:  # neither solved nor stopped with a bound
        return chosen, bound.excess
    proven = (result.mip_dual_bound / OBJECTIVE_SCALE - 1) * bound.excess + bound.multiplier * remainder
    excess = bound.excess - max(0.0, proven)
    if result.x is None:
        return chosen, excess
    refined = kept[result.x[:-1] > 0.5]
    fits = len(refined) == len(chosen) and fronts.cost[refined].sum() <= limit
    return (refined if fits else chosen), excess
