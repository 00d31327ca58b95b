"""Tokens that have left the 16-bit window of a layer, all of them quantized, until they are ranked."""

from __future__ import annotations

import torch
from ib_kernels import PackedTokens, quantize_pack
from ib_kernels.backends import Backend
from torch import Tensor

from ib_analysis.cache.plan import QUANTIZED_FORM


class QuantizedWindow:
    """Consecutive positions of B sequences and H_kv heads, the oldest first. Padding has a position, but is not stored."""

    def __init__(self, tokens: PackedTokens, batch: int, length: int, mask: Tensor | None) -> None:
        """`length` positions of `batch` sequences, of which `mask` bool [B, length] holds tokens; None if all do."""
        self.tokens, self.batch, self.length, self.mask = tokens, batch, length, mask
        self.heads = len(tokens.lengths) // batch

    @classmethod
    def pack(cls, keys: Tensor, values: Tensor, present: Tensor, dtype: torch.dtype, backend: Backend) -> QuantizedWindow:
        """Stores keys and values [B, H_kv, n, D] of the tokens `present`, bool [B, n]; others are padding."""
        batch, heads, length, _ = keys.shape
        lengths = _run_lengths(present, heads)
        pairs = torch.arange(len(lengths), dtype=torch.int32, device=keys.device)
        rows = present[:, None].expand(keys.shape[:3]).flatten().nonzero()[:, 0]
        packed = quantize_pack(
            QUANTIZED_FORM[0], keys, values, rows, lengths, pairs, *QUANTIZED_FORM[1:], raw_dtype=dtype, backend=backend
        )
        return cls(PackedTokens(packed, dtype, backend), batch, length, _if_padded(present))

    def __len__(self) -> int:
        return self.length

    @property
    def present(self) -> Tensor:
        """Which positions hold a token: bool [B, n]."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.batch, self.length, dtype=torch.bool, device=self.tokens.lengths.device)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Keys and values fp32 [B, H_kv, n, D], zero where there is padding."""
        shape = (self.batch, self.heads, self.length)
        where = self.present[:, None].expand(shape)
        keys, values = (
            x.new_zeros(*shape, x.shape[-1]).masked_scatter(where[..., None].expand(*shape, x.shape[-1]), x)
            for x in self.tokens.unpack()
        )
        return keys, values

    def append(self, keys: Tensor, values: Tensor, present: Tensor) -> None:
        """As many newer positions as keys and values [B, H_kv, n, D] have."""
        where = present[:, None].expand(keys.shape[:3])
        self.tokens.append(keys[where], values[where], _run_lengths(present, self.heads))
        self.mask = _if_padded(torch.cat([self.present, present], 1))
        self.length += keys.shape[2]

    def drop(self, count: int) -> None:
        """Forgets so many of the oldest positions."""
        present = self.present
        self.tokens = self.tokens.without_first(_run_lengths(present[:, :count], self.heads))
        self.mask = _if_padded(present[:, count:])
        self.length -= count

    def select(self, indices: Tensor) -> None:
        """Keeps these sequences, in this order."""
        runs = indices[:, None] * self.heads + torch.arange(self.heads, device=indices.device)
        self.tokens, self.batch = self.tokens.select(runs.flatten()), len(indices)
        self.mask = None if self.mask is None else _if_padded(self.mask[indices])

    def to(self, device: torch.device) -> None:
        self.tokens, self.mask = self.tokens.to(device), None if self.mask is None else self.mask.to(device)

    def tensors(self) -> list[Tensor]:
        """Every tensor that holds tokens, or says which there are."""
        held = list(self.tokens.tensors().values())
        return held if self.mask is None else [*held, self.mask]


def _run_lengths(present: Tensor, heads: int) -> Tensor:
    """Tokens of each (sequence, head) pair: int32 [B * H_kv]."""
    return present.sum(1, dtype=torch.int32).repeat_interleave(heads)


def _if_padded(present: Tensor) -> Tensor | None:
    return None if bool(present.all()) else present.clone()
