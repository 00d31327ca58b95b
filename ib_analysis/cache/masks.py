"""What a step may say of tokens that are compressed: nothing but which of them are padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor


class MaskCheck:
    """Of the layers of one cache, which see the same masks: each mask is read once, because reading waits for a GPU."""

    def __init__(self) -> None:
        self._passed: tuple[Callable[[], Tensor | None], int] = (lambda: None), 0  # the last mask, for so many tokens

    def check(self, mask: Tensor, tokens: int, start: int, padding: Sequence[int]) -> None:
        """Raises ValueError unless every query sees all positions before `start` but so many of each sequence, its padding.

        mask is bool [B or 1, 1, M, T], with T = `tokens`. What padded queries see does not matter.
        """
        passed, of_tokens = self._passed
        if mask is passed() and tokens == of_tokens:
            return
        check_dtype(mask)
        if mask.shape[-1] != tokens:
            raise ValueError(f"the mask is for {mask.shape[-1]} tokens, but with the new ones there are {tokens}")
        sees = mask[:, 0].expand(len(padding), -1, -1)  # [B, M, T]
        older = tokens - sees.shape[1]
        expected = start - torch.tensor(padding, device=mask.device)[:, None]
        wrong = (sees[..., :start].sum(-1) != expected) & sees.diagonal(older, 1, 2)  # [B, M]
        if bool(wrong.any()):
            sequence, row = wrong.nonzero()[0].tolist()
            raise ValueError(_disagreement(sees[sequence, row, :start], sequence, older + row, padding[sequence]))
        self._passed = ref(mask), tokens


def check_dtype(mask: Tensor) -> None:
    """Raises ValueError for masks that are added to logits."""
    if mask.dtype != torch.bool:
        raise ValueError(f"a compressed cache takes masks of bool, true where a token is seen, not of {mask.dtype}")


def check_use(extras: Mapping[str, Any], tokens: int, length: int) -> None:
    """Raises ValueError for a block of `length` positions that begins anew, while the cache holds `tokens`.

    So does `generate` with use_cache=False: it reads the whole text at every step, and a cache would take all of it for new.
    Some models say use_cache=False of themselves, so positions are looked at, too.
    """
    positions = extras.get("position_ids")
    if extras.get("use_cache") is False and length > tokens and positions is not None and int(positions[..., -1].max()) < length:
        raise ValueError(
            f"use_cache is False, so the model reads the whole text again, but into a cache that holds {tokens} tokens of it: "
            "pass use_cache=True, or no cache"
        )


def valid_tokens(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Which tokens of the first block are no padding: bool [B, T].

    Raises ValueError unless padding is on the left, and for masks that are added to logits.
    """
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    check_dtype(mask)
    valid = mask[:, 0, -1].expand(batch, -1)
    if not only_in_front(valid):
        raise ValueError("a compressed cache needs padding on the left: set tokenizer.padding_side = 'left'")
    return valid


def only_in_front(valid: Tensor) -> bool:
    """Whether what is not valid, bool [B, T], comes before all that is."""
    return bool((valid[:, 1:] >= valid[:, :-1]).all())


def _disagreement(seen: Tensor, sequence: int, position: int, padding: int) -> str:
    """What is wrong with what the token at `position` sees, bool [start], of tokens that have been compressed."""
    hidden = (~seen).nonzero()[:, 0].tolist()
    if len(hidden) < padding:
        return (
            f"the mask shows the token at position {position} of sequence {sequence} tokens that were hidden when the others "
            "were compressed: these are not in the cache"
        )
    new = hidden[padding:]  # the first are the padding, if that is on the left
    return (
        f"the mask hides from the token at position {position} of sequence {sequence} tokens that are compressed, at positions "
        f"{new[0]} to {new[-1]}, {len(new)} in all: only padding can be hidden there, from the first step on; what is to be "
        "forgotten later needs a cache of its own"
    )
