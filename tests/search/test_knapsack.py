"""The knapsack against brute force on small instances, and its guarantees on larger ones."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ib_analysis.errors import BudgetError
from ib_analysis.search.knapsack import curve, solve


@dataclass
class Instance:
    losses: list[np.ndarray]
    costs: list[np.ndarray]
    scale: float  # of the losses

    def total(self, choice: np.ndarray) -> tuple[float, int]:
        loss = sum(float(group[o]) for group, o in zip(self.losses, choice, strict=True))
        return loss, sum(int(group[o]) for group, o in zip(self.costs, choice, strict=True))

    def minimum(self) -> int:
        return sum(int(cost[np.isfinite(loss)].min()) for loss, cost in zip(self.losses, self.costs, strict=True))

    def optimum(self, limit: int) -> float:
        loss, cost = np.zeros(1), np.zeros(1, dtype=int)  # of every choice of the groups so far
        for u in range(len(self.losses)):
            loss = np.add.outer(loss, self.losses[u]).ravel()
            cost = np.add.outer(cost, self.costs[u]).ravel()
        return float(loss[cost <= limit].min())


def scattered(seed: int) -> Instance:
    """5 groups of 5 options without structure, where the greedy choice is seldom the best."""
    rng = np.random.default_rng(seed)
    scale, largest_cost = rng.choice([1.0, 1e-6, 1e-12]), rng.choice([10, 10**3, 10**7])
    losses = scale * rng.random((5, 5)) if rng.random() < 0.7 else scale * rng.integers(0, 8, (5, 5)) / 8
    return Instance(list(losses), list(rng.integers(0, largest_cost, (5, 5))), float(scale))


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Up to 5 groups of up to 5 options, with ties, zeros, negative and infinite losses, at any scale."""
    scale = draw(st.sampled_from([1.0, 1e-6, 1e-12, 1e6]))
    loss = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]) | st.floats(-0.25, 1) | st.just(float("inf"))
    cost = st.integers(0, 12) | st.integers(0, 10**7)
    losses, costs = [], []
    for _ in range(draw(st.integers(1, 5))):
        group = draw(st.lists(loss, min_size=1, max_size=5).filter(lambda drawn: min(drawn) < np.inf))
        losses.append(scale * np.array(group))
        costs.append(np.array(draw(st.lists(cost, min_size=len(group), max_size=len(group)))))
    return Instance(losses, costs, scale)


def limits(instance: Instance) -> st.SearchStrategy[int]:
    most = sum(int(cost.max()) for cost in instance.costs)
    return st.integers(instance.minimum(), max(most, instance.minimum()) + 3)


def heads(groups: int, options: int, seed: int) -> Instance:
    """Losses that fall with the bytes, at a different scale for each head, in no order."""
    rng = np.random.default_rng(seed)
    costs = [rng.integers(1, 10**6, options) for _ in range(groups)]
    scales = np.exp(rng.normal(0, 2, groups))
    losses = [a * 4.0 ** (-c / 3e5) * np.exp(rng.normal(0, 0.2, options)) for a, c in zip(scales, costs, strict=True)]
    return Instance(losses, costs, 1.0)


def check_optimal(instance: Instance, limit: int) -> None:
    solution = solve(instance.losses, instance.costs, limit, gap=0)
    loss, cost = instance.total(solution.choice)
    optimum = instance.optimum(limit)
    rounding = 1e-9 * instance.scale
    assert solution.cost == cost <= limit
    assert solution.loss == pytest.approx(loss, abs=rounding)
    assert abs(solution.loss - optimum) <= rounding
    assert optimum - rounding <= solution.dual_bound <= min(optimum + rounding, solution.loss)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_solver_equals_brute_force(data: st.DataObject) -> None:
    instance = data.draw(instances())
    check_optimal(instance, data.draw(limits(instance)))


@pytest.mark.parametrize("seed", range(300))
def test_solver_equals_brute_force_where_greedy_fails(seed: int) -> None:
    instance = scattered(seed)
    most = sum(int(cost.max()) for cost in instance.costs)
    check_optimal(instance, instance.minimum() + seed % 50 * (most - instance.minimum()) // 100)


@pytest.mark.parametrize("gap", [np.inf, 0.1, 0.01, 1e-4])
@pytest.mark.parametrize("seed", range(25))
def test_every_gap_is_certified(gap: float, seed: int) -> None:
    instance = scattered(seed)
    limit = 2 * instance.minimum() + 5
    solution = solve(instance.losses, instance.costs, limit, gap=gap)
    optimum = instance.optimum(limit)
    rounding = 1e-9 * instance.scale
    assert solution.cost <= limit
    assert solution.dual_bound <= optimum + rounding
    assert solution.loss >= optimum - rounding
    assert 0 <= solution.gap <= max(gap, 1e-9)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_loss_never_increases_with_the_limit(data: st.DataObject) -> None:
    instance = data.draw(instances())
    budgets = sorted(data.draw(st.lists(limits(instance), min_size=2, max_size=6)))
    losses = [solve(instance.losses, instance.costs, limit, gap=0).loss for limit in budgets]
    assert all(after <= before + 1e-9 * instance.scale for before, after in pairwise(losses))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_curve_is_feasible_monotone_and_consistent_with_solve(data: st.DataObject) -> None:
    instance = data.draw(instances())
    path = curve(instance.losses, instance.costs)
    rounding = 1e-9 * instance.scale
    assert path.cost[0] == instance.minimum()
    assert (np.diff(path.cost) > 0).all()
    assert (np.diff(path.loss) <= 0).all()
    assert (np.diff(path.multiplier) <= 0).all() and (path.multiplier >= 0).all()
    for cost, loss in zip(path.cost.tolist(), path.loss.tolist(), strict=True):
        assert instance.total(path.choice(cost)) == (pytest.approx(loss, abs=rounding), cost)
        assert solve(instance.losses, instance.costs, cost, gap=0).loss == pytest.approx(loss, abs=rounding)
    limit = data.draw(limits(instance))
    loss, cost = instance.total(path.choice(limit))
    solution = solve(instance.losses, instance.costs, limit, gap=0)
    assert cost <= limit
    assert np.interp(limit, path.cost, path.loss) - rounding <= solution.loss <= loss + rounding


def test_curve_is_nested() -> None:
    instance = heads(20, 30, seed=0)
    path = curve(instance.losses, instance.costs)
    choices = np.stack([path.choice(limit) for limit in path.cost])  # [S + 1, U]
    spent = np.stack([cost[choices[:, u]] for u, cost in enumerate(instance.costs)])  # [U, S + 1]
    assert (np.diff(spent) >= 0).all()
    assert ((np.diff(spent) > 0).sum(axis=0) == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-150, 1e150])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_larger_instances_reach_the_gap_at_any_scale(scale: float, share: float) -> None:
    instance = heads(60, 40, seed=1)
    losses = [scale * loss for loss in instance.losses]
    limit = int(share * sum(cost.max() for cost in instance.costs))
    solution = solve(losses, instance.costs, limit)
    exact = solve(losses, instance.costs, limit, gap=0)
    coarse = solve(losses, instance.costs, limit, gap=3e-3)
    assert coarse.dual_bound <= exact.loss * (1 + 1e-12)
    assert max(solution.cost, exact.cost) <= limit
    assert solution.gap <= 1e-4
    assert exact.gap <= 1e-9
    assert exact.loss <= solution.loss * (1 + 1e-12)
    assert solution.dual_bound <= exact.loss * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_a_refinement_that_stops_early_is_certified(seed: int) -> None:
    instance = heads(20, 40, seed)
    limit = int(0.1 * sum(cost.max() for cost in instance.costs))
    greedy = solve(instance.losses, instance.costs, limit, gap=np.inf)
    refined = solve(instance.losses, instance.costs, limit, gap=0.9 * greedy.gap)
    exact = solve(instance.losses, instance.costs, limit, gap=0)
    assert refined.gap <= 0.9 * greedy.gap
    assert refined.dual_bound <= exact.loss * (1 + 1e-12)
    assert exact.loss <= refined.loss * (1 + 1e-12)
    assert refined.loss <= greedy.loss


def test_an_offset_changes_no_choice() -> None:
    instance = heads(60, 40, seed=2)
    limit = int(0.3 * sum(cost.max() for cost in instance.costs))
    shifted = solve([loss - 5.0 for loss in instance.losses], instance.costs, limit, gap=0)
    assert shifted.loss + 5.0 * 60 == pytest.approx(solve(instance.losses, instance.costs, limit, gap=0).loss, abs=1e-9)


def test_out_of_time_the_greedy_choice_and_its_bound_stand() -> None:
    instance = heads(30, 40, seed=3)
    limit = int(0.2 * sum(cost.max() for cost in instance.costs))
    greedy = solve(instance.losses, instance.costs, limit, gap=0, time_limit_s=0)
    exact = solve(instance.losses, instance.costs, limit, gap=0)
    assert greedy.cost <= limit
    assert greedy.dual_bound <= exact.loss <= greedy.loss


def test_the_greedy_choice_spends_its_leftover() -> None:
    losses, costs = [np.array([1.0, 0.0]), np.array([0.5, 0.2])], [np.array([0, 100]), np.array([0, 50])]
    assert solve(losses, costs, 60, gap=np.inf).choice.tolist() == [0, 1]
    above_the_hull = [np.array([1.0, 0.9, 0.0])], [np.array([0, 60, 100])]
    assert solve(*above_the_hull, 60, gap=np.inf).choice.tolist() == [1]


def test_more_than_enough_bytes_take_the_best_of_each_group() -> None:
    solution = solve([np.array([3.0, 1.0, 1.0, 2.0])], [np.array([1, 9, 8, 30])], 10**12)
    assert (solution.choice.tolist(), solution.loss, solution.cost, solution.gap) == ([2], 1.0, 8, 0.0)


def test_of_equal_options_the_first_is_chosen() -> None:
    solution = solve([np.array([1.0, 0.5, 0.5])], [np.array([0, 4, 4])], 4)
    assert solution.choice.tolist() == [1]


def test_a_forbidden_option_does_not_count_as_the_cheapest() -> None:
    losses, costs = [np.array([np.inf, 1.0])], [np.array([0, 1234])]
    assert solve(losses, costs, 1234).choice.tolist() == [1]
    for refuse in (lambda: solve(losses, costs, 1233), lambda: curve(losses, costs).choice(1233)):
        with pytest.raises(BudgetError, match=r"1,233 bytes .* 1,234 bytes"):
            refuse()


@pytest.mark.parametrize(
    ("losses", "costs", "message"),
    [
        ([[1.0, np.nan]], [[1, 2]], "group 0: a loss is NaN"),
        ([[1.0], [-np.inf]], [[1], [2]], "group 1: a loss is NaN, minus infinity"),
        ([[1.0], [np.inf, np.inf]], [[1], [1, 2]], "group 1 has no option"),
        ([[1.0, 2.0]], [[1]], "group 0: losses and integer costs"),
        ([[1.0, 2.0]], [[1.0, 2.0]], "group 0: losses and integer costs"),
        ([[[1.0]]], [[[1]]], "group 0: losses and integer costs"),
        ([[]], [np.zeros(0, dtype=int)], "group 0 has no option"),
        ([[1.0]], [[1], [2]], "one array per group"),
        ([], [], "one array per group"),
    ],
)
def test_bad_tables(losses: list, costs: list, message: str) -> None:
    tables = [np.array(loss) for loss in losses], [np.array(cost) for cost in costs]
    with pytest.raises(ValueError, match=message):
        solve(tables[0], tables[1], 100)
    with pytest.raises(ValueError, match=message):
        curve(tables[0], tables[1])
