"""Speed as ratios, measured in one run: python -m ib_analysis.estimators.benchmark

Heads in a batch against a loop over heads, and KSG against the neighbour search of scikit-learn that it would otherwise use.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from ib_analysis.estimators import KSG, CopulaGaussian, DitheredChannel, Gaussian
from ib_analysis.estimators.known_information import KNOWN_TASKS
from ib_analysis.estimators.ksg import information_nats

REPEATS = 3
SHAPES = [(8, 1500, 64), (64, 1500, 64), (64, 300, 8), (256, 100, 2)]  # heads, samples, dimensions of x and of y
KSG_TASKS = ["1v1 normal 0.75", "spiral of multinormal sparse 3x3", "multinormal sparse 5x5", "multinormal dense 50x50"]


def main() -> None:
    """Prints one line a comparison; above 1 is faster than what it is compared with."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    for heads, count, dim in SHAPES:
        x = torch.tensor(rng.standard_normal((heads, count, dim)))
        y = x + 0.5 * torch.tensor(rng.standard_normal((heads, count, dim)))
        for method in (Gaussian(), CopulaGaussian(), DitheredChannel()):
            batch = _seconds(lambda: method.estimate(x, y))  # noqa: B023
            loop = _seconds(lambda: [method.estimate(*head) for head in zip(x, y)])  # noqa: B023
            print(f"{method.name}, {heads} heads of {count} x {dim}: {1e3 * batch:.1f} ms, {loop / batch:.1f}x a loop")
    for name in KSG_TASKS:
        x, y = map(torch.tensor, KNOWN_TASKS[name].sample(10_000, rng))
        pairs = torch.cat([x, y], dim=1).numpy()
        search = NearestNeighbors(n_neighbors=KSG().neighbours + 1, metric="chebyshev", n_jobs=1)
        theirs = _seconds(lambda: search.fit(pairs).kneighbors(pairs))  # noqa: B023
        ours = _seconds(lambda: information_nats(x, y, KSG().neighbours))  # noqa: B023
        print(f"ksg, {name}: {1e3 * ours:.0f} ms, {theirs / ours:.1f}x the search of scikit-learn alone")


def _seconds(run: Callable[[], object]) -> float:
    """Least time of several runs."""
    times = []
    for _ in range(REPEATS):
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
