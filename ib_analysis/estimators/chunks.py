"""Heads, a few at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_BYTES = 2**21  # of samples at once: what is computed from them then stays in the processor's cache


def in_chunks(function: Callable[..., tuple[Tensor, ...]], *values: Tensor) -> tuple[Tensor, ...]:
    """function(*values) for values [..., N, d], whose results are [...] or longer: called with [H, N, d] of few heads at a time.

    Large temporaries cost more than the arithmetic on them. A GPU takes all heads at once.
    """
    shape = values[0].shape[:-2]
    heads = [tensor.reshape(-1, *tensor.shape[-2:]) for tensor in values]
    count = len(heads[0])
    if values[0].device.type == "cpu":
        count = max(1, CHUNK_BYTES // sum(tensor[0].nbytes for tensor in heads))
    results = zip(*(function(*chunk) for chunk in zip(*(tensor.split(count) for tensor in heads))))
    return tuple(torch.cat(parts).reshape(shape + parts[0].shape[1:]) for parts in results)
