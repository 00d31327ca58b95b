"""Fits the learned scorer to a model: from each token's signs to what evicting it would cost."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import PoissonRegressor
from torch import Tensor, nn

from ib_analysis.cache.spec import CacheSpec
from ib_analysis.model.devices import input_device
from ib_analysis.replay.replay import Replay
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS
from ib_analysis.scorers.learned import SIGNS, Learned, token_signs
from ib_analysis.search.token_losses import token_losses

TOKENS, PROMPTS = 2**15, 16  # to fit on: so many tokens, but of no fewer prompts
RIDGE = 0.3  # on weights of signs in standard deviations
TINY = 1e-30  # so that a sign that never differs is not divided by 0
LARGEST = 1e4  # of a token's share, in means of its prompt


class TokenRows(NamedTuple):
    """The compressible tokens of one example, for each of U heads in the order of `shape.heads`."""

    signs: Tensor  # fp16 [U, n, signs]
    losses: Tensor  # fp32 [U, n], what evicting each would cost


def unfitted(spec: CacheSpec) -> CacheSpec:
    """The spec before its bases, and its learned scorer if it has one, were fitted."""
    return replace(spec, scorer=Learned() if isinstance(spec.scorer, Learned) else spec.scorer, bases=None)


def prompts_to_read(replays: Replays) -> int:
    """How many examples a fit needs."""
    return min(len(replays), max(PROMPTS, int(np.searchsorted(np.cumsum(replays.lengths), TOKENS)) + 1))


def read_tokens(replays: Replays, seed: int = 0) -> Iterator[tuple[TokenRows, list[Tensor]]]:
    """The signs and losses of the tokens of as many examples as a fit needs, one example after the other.

    Beside them the moments that `fit_bases` takes (see `TokenLosses`).
    """
    model, spec = replays.model, replays.spec

    def read(number: int) -> tuple[TokenRows, list[Tensor]]:
        watching = _Watching()
        replay = Replay(model, replace(spec, scorer=watching), replays.examples[number])
        compressible = slice(replay.first, replay.first + replay.tokens)
        signs = torch.cat([watching.signs[layer][:, compressible] for layer in spec.shape.compressible])
        losses = token_losses(replay, torch.Generator(input_device(model)).manual_seed(seed * 1_000_003 + number))
        return TokenRows(signs.half(), losses.evicted), losses.moments

    with closing(replays.each(read, range(prompts_to_read(replays)), "learning which tokens matter")) as found:
        yield from found


def fit_scorer(spec: CacheSpec, rows: Sequence[TokenRows]) -> Learned:
    """For each head a Poisson regression of tokens' losses on their signs, both relative to their prompt."""
    weights = iter([_regress([(some.signs[u], some.losses[u]) for some in rows]) for u in range(len(spec.shape.heads))])
    return Learned(
        tuple(
            tuple(next(weights) for _ in range(layer.kv_heads)) if layer.sliding_window is None else ()
            for layer in spec.shape.layers
        )
    )


class _Watching:
    """Ranks by value-aware attention, and keeps each layer's signs [H_kv, T, signs]."""

    def __init__(self) -> None:
        self.signs: dict[int, Tensor] = {}

    def __call__(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
        layer = module.layer_idx
        assert isinstance(layer, int)
        self.signs[layer] = token_signs(module, query, keys, values, valid, scaling)[0].cpu()
        return SCORERS["value_aware"](module, query, keys, values, valid, scaling)


def _regress(prompts: list[tuple[Tensor, Tensor]]) -> tuple[float, ...]:
    """Weights of one head's signs, from each prompt's signs [n, signs] and losses [n]."""
    rows, shares = [], []
    for signs, losses in prompts:
        mean = float(losses.double().mean())
        if mean > 0:
            rows.append(signs.double().numpy() - signs.double().numpy().mean(0))
            shares.append(np.minimum(losses.double().numpy() / mean, LARGEST))
    if not rows:
        return (0.0,) * len(SIGNS)
    x: NDArray[np.float64] = np.concatenate(rows)
    scale = x.std(0) + TINY
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what it has found by then ranks tokens as well
        model = PoissonRegressor(alpha=RIDGE, max_iter=300, tol=1e-5)
        model.fit(x / scale, np.concatenate(shares))
    return tuple(float(f"{weight:.5g}") for weight in model.coef_ / scale)
