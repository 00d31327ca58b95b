"""A batch that grows from layer to layer: plans that agree up to a layer are one row there, computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ib_analysis.cache.plan import LayerPlans, PlansToTry


@dataclass(frozen=True)
class Growth:
    """Rows of the batch at each layer.

    Attributes:
        rows: of each layer, what each row's heads are given.
        parents: of each layer, the row of the layer before that each row continues; the first layer continues one row.
        last: the row of each plan at the end.
    """

    rows: list[list[LayerPlans]]
    parents: list[list[int]]
    last: list[int]


def growth(tried: Sequence[PlansToTry], layers: int) -> Growth:
    """The rows of a batch of plans."""
    rows: list[list[LayerPlans]] = []
    parents: list[list[int]] = []
    row = [0] * len(tried)
    for layer in range(layers):
        keys = [(before, None if plans[layer] is None else tuple(plans[layer] or ())) for before, plans in zip(row, tried)]
        number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
        rows.append([given for _, given in number])
        parents.append([before for before, _ in number])
        row = [number[key] for key in keys]
    return Growth(rows, parents, row)


@contextmanager
def growing(layers: Sequence[nn.Module], parents: Sequence[Sequence[int]]) -> Iterator[None]:
    """Within it, each layer reads its rows' hidden states from those of their parents, in this thread."""
    thread, width, hooks = get_ident(), 1, []
    for layer, rows in zip(layers, parents):
        if list(rows) != list(range(width)):
            hooks.append(layer.register_forward_pre_hook(_select(list(rows), thread), with_kwargs=True))
        width = len(rows)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _select(rows: list[int], thread: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]] | None:
        # Threads share the model. In another one a hook that is just being removed comes without its keywords.
        if get_ident() != thread or kwargs is None:
            return None
        if args:
            return (_rows(args[0], rows), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _rows(kwargs["hidden_states"], rows)}

    return hook


def _rows(states: Tensor, rows: list[int]) -> Tensor:
    return states.index_select(0, torch.tensor(rows, device=states.device))
