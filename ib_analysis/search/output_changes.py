"""How far heads' outputs move in given directions under many plans at once.

Tokens are taken in the scorer's order, so every plan keeps a piece of one list: sums of softmax weights, and of weights times
values projected on the directions, are added up once along the list for each precision, and every share of the tokens is read
off. Values are projected less the full output, so that small changes are not differences of large numbers.

Approximation: what a tier's codes are depends a little on which tokens are stored with it (the centre of rotated keys, the
groups of 32 tokens of kivi keys). Codes are made for runs of all tokens, a quarter and a sixteenth of them, the first in order,
and a tier takes those of the shortest of these runs that contains it. Plans of one tier of such a share are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from ib_kernels import Bases, Quantizer, SideName, get_format, roundtrip
from torch import Tensor

from ib_analysis.cache.plan import FULL, HeadPlan
from ib_analysis.cache.tiers import tier_counts

Store = tuple[str, int]  # format, bits

RUN_SHARES = (1.0, 1 / 4, 1 / 16)
BLOCK_ELEMENTS = 2**21  # of weights and projected values: so many tokens are read at a time
FARTHEST = 60.0  # nats by which a logit may exceed the log-sum-exp of what is never compressed, for sums in float32
HIGHEST = 75.0  # nats up to which logits of quantized keys count: those of a few bits may be far too large


@dataclass(frozen=True)
class _Piece:
    """What a tier keeps: tokens ranked from `begin` to before `end`."""

    format: str
    full: bool  # at 16 bits, where the format does not matter
    begin: int
    end: int
    key_bits: int
    value_bits: int


@dataclass(frozen=True, eq=False)
class Attending:
    """U heads alike: the queries of a follow-up, what they see, and the directions in which their outputs are read.

    Attributes:
        query: fp32 [U, R, D].
        keys, values: fp32 [U, n, D], the compressible tokens by position.
        order: int64 [U, n], positions by rank.
        exact: (out fp32 [U, R, D], natural log-sum-exp [U, R]) of attention to what is never compressed.
        full: fp32 [U, R, D], the outputs if nothing is compressed.
        directions: fp32 [U, S, R, D].
        dtype: of tokens at 16 bits.
        bases: of these heads, for formats that store keys in them.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    order: Tensor
    exact: tuple[Tensor, Tensor]
    full: Tensor
    directions: Tensor
    scaling: float
    softcap: float | None
    dtype: torch.dtype
    bases: Bases | None = None

    def logits(self, keys: Tensor) -> Tensor:
        """[U, R, t] of keys [U, t, D]."""
        logits = self.query @ keys.transpose(1, 2) * self.scaling
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Running sums over a list of tokens, read at E edges: of weights [U, R, K, E], and of weights times projected values
    [U, R, K, S * V, E], for K key and V value precisions."""

    weights: Tensor
    projected: Tensor


def output_changes(heads: Attending, plans: Sequence[HeadPlan]) -> Tensor:
    """Sums over rows of the directions times the change of the output: fp64 [U, S, plans]."""
    tokens = heads.order.shape[1]
    pieces = [_pieces(plan, tokens) for plan in plans]
    index = {piece: number for number, piece in enumerate(dict.fromkeys(piece for some in pieces for piece in some))}
    holds = torch.zeros(len(index), len(plans))  # 1 where a plan has a piece
    for number, some in enumerate(pieces):
        for piece in some:
            holds[index[piece], number] = 1.0
    holds = holds.to(heads.query.device)
    level = torch.einsum("urd,usrd->urs", heads.full, heads.directions)  # of the full output
    shift = _shift(heads)  # [U, R]
    weights, projected = _read(heads, list(index), level, shift)
    exact_out, exact_lse = heads.exact
    exact = (exact_lse - shift).exp()  # [U, R]
    moved = torch.einsum("urd,usrd->urs", exact_out - heads.full, heads.directions)
    total = weights @ holds + exact[..., None]  # [U, R, plans]
    change = projected @ holds + (exact[..., None] * moved)[..., None]  # [U, R, S, plans]
    return (change / total[:, :, None].clamp(min=torch.finfo(torch.float32).tiny)).sum(1, dtype=torch.float64)


def _pieces(plan: HeadPlan, tokens: int) -> list[_Piece]:
    tiers = zip(plan.tiers, pairwise(plan.edges(tokens)))
    return [
        _Piece(plan.format, (tier.key_bits, tier.value_bits) == FULL, begin, end, tier.key_bits, tier.value_bits)
        for tier, (begin, end) in tiers
        if begin < end
    ]


def _shift(heads: Attending) -> Tensor:
    """What is taken off the logits of each row, so that sums of their exponentials are finite: fp32 [U, R]."""
    highest = torch.full_like(heads.exact[1], -torch.inf)
    for begin, end in _blocks(heads, 0, heads.keys.shape[1], 1):
        highest = torch.maximum(highest, heads.logits(heads.keys[:, begin:end]).amax(-1))
    return torch.maximum(heads.exact[1], highest - FARTHEST)


def _read(heads: Attending, pieces: list[_Piece], level: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over each piece's tokens: of weights [U, R, pieces], and of weights times projected values [U, R, S, pieces]."""
    (u, r, s), tokens = level.shape, heads.order.shape[1]
    weights = level.new_empty(u, r, len(pieces))
    projected = level.new_empty(u, r, s, len(pieces))
    runs = sorted({int(count) for share in RUN_SHARES for count in tier_counts((share,), tokens)})
    by_run: dict[tuple[Quantizer, bool, int], list[int]] = {}  # of formats that store values alike, what is kept of them once
    for number, piece in enumerate(pieces):
        run = next(run for run in runs if run >= piece.end)
        by_run.setdefault((get_format(piece.format).values, piece.full, run), []).append(number)
    for (_, _, run), numbers in by_run.items():
        some = [pieces[number] for number in numbers]
        edges = sorted({0, *(piece.begin for piece in some), *(piece.end for piece in some)})
        key_stores = sorted({(piece.format, piece.key_bits) for piece in some})
        value_bits = sorted({piece.value_bits for piece in some})
        value_stores = [(some[0].format, bits) for bits in value_bits]
        sums = _running_sums(heads, run, edges, key_stores, value_stores, level, shift)
        begin = torch.tensor([edges.index(piece.begin) for piece in some])
        end = torch.tensor([edges.index(piece.end) for piece in some])
        k = torch.tensor([key_stores.index((piece.format, piece.key_bits)) for piece in some])
        v = torch.tensor([value_bits.index(piece.value_bits) for piece in some])
        weights[..., numbers] = (sums.weights[:, :, k, end] - sums.weights[:, :, k, begin]).float()
        by_value = sums.projected.unflatten(3, (s, len(value_bits)))  # [U, R, K, S, V, E]
        read = by_value[:, :, k, :, v, end] - by_value[:, :, k, :, v, begin]  # [pieces, U, R, S]
        projected[..., numbers] = read.movedim(0, -1).float()
    return weights, projected


def _running_sums(
    heads: Attending,
    run: int,
    edges: list[int],
    key_stores: list[Store],
    value_stores: list[Store],
    level: Tensor,
    shift: Tensor,
) -> _Sums:
    """Along the first `run` tokens in order, stored together in each of these ways."""
    u, r, s = level.shape
    taken, rank = heads.order[:, :run].sort(1)  # positions, and the rank of each
    keys = torch.stack([_stored(heads, store, "keys", taken, rank) for store in key_stores], 1)  # [U, K, run, D]
    values = torch.stack([_stored(heads, store, "values", taken, rank) for store in value_stores], 1)  # [U, V, run, D]
    along = heads.directions.transpose(1, 2).flatten(1, 2)  # [U, R * S, D]
    weight_sums = [torch.zeros(u * r, len(key_stores), dtype=torch.float64, device=level.device)]
    value_sums = [torch.zeros(u * r, len(key_stores), s * len(value_stores), dtype=torch.float64, device=level.device)]
    for begin, end in pairwise(edges):
        total, value_total = weight_sums[-1].clone(), value_sums[-1].clone()
        for first, last in _blocks(heads, begin, end, len(key_stores) + s * len(value_stores)):
            logits = heads.logits(keys[:, :, first:last].flatten(1, 2)) - shift[..., None]  # [U, R, K * t]
            weights = logits.clamp_(max=HIGHEST).exp_().view(u * r, len(key_stores), last - first)
            projected = along @ values[:, :, first:last].flatten(1, 2).transpose(1, 2)  # [U, R * S, V * t]
            projected = projected.view(u, r, s, len(value_stores), -1) - level[..., None, None]
            total += weights.sum(-1)
            value_total += weights @ projected.view(u * r, s * len(value_stores), -1).transpose(1, 2)
        weight_sums.append(total)
        value_sums.append(value_total)
    return _Sums(
        torch.stack(weight_sums, -1).unflatten(0, (u, r)),
        torch.stack(value_sums, -1).unflatten(0, (u, r)),
    )


def _stored(heads: Attending, store: Store, side: SideName, taken: Tensor, rank: Tensor) -> Tensor:
    """Keys or values after quantization, of the tokens at positions `taken` [U, run], in order of their rank: [U, run, D]."""
    x, (fmt, bits) = heads.keys if side == "keys" else heads.values, store
    wide = taken[..., None].expand(-1, -1, x.shape[-1])
    rows = x.gather(1, wide)
    lengths = torch.full((len(x),), rows.shape[1], device=x.device)
    stored = roundtrip(fmt, side, rows.flatten(0, 1), lengths, bits, heads.dtype, heads.bases).view(rows.shape)
    return torch.empty_like(stored).scatter_(1, rank[..., None].expand_as(stored), stored)


def _blocks(heads: Attending, begin: int, end: int, rows: int) -> list[tuple[int, int]]:
    """Ranks from `begin` to `end` in blocks, for each token of which `rows` numbers a query are held."""
    u, r, _ = heads.query.shape
    size = max(1, BLOCK_ELEMENTS // (u * r * rows))
    return [(first, min(first + size, end)) for first in range(begin, end, size)]
