"""What tiers store: codes and decoded values of their tokens, gathered prompt by prompt in memory that does not grow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ib_analysis.estimators.entropy import entropies_of_counts_bits
from ib_analysis.estimators.gaussian import regular, total_correlation_or_nan_bits
from ib_analysis.estimators.moments import GROUPS, Moments
from ib_analysis.formats import RAW_BITS, get_format
from ib_analysis.formats.packed import roundtrip_keys, roundtrip_values
from ib_analysis.plan import HeadPlan, Tier
from ib_analysis.replay import Replay

Part = Literal["keys", "values"]
PARTS: tuple[Part, Part] = ("keys", "values")
MISFIT_DEVIATIONS = 5.0


@dataclass(frozen=True)
class Piece:
    """The keys, or the values, of the last of some tiers: its format and bits, and the token shares of all tiers up to it."""

    part: Part
    format: str
    bits: int  # 16: raw floats
    shares: tuple[float, ...]


def pieces_of(plan: HeadPlan) -> list[dict[Part, Piece]]:
    """For each tier of a plan the pieces that it stores."""
    shares = tuple(tier.share for tier in plan.tiers)
    return [
        {
            "keys": Piece("keys", plan.format, tier.key_bits, shares[: t + 1]),
            "values": Piece("values", plan.format, tier.value_bits, shares[: t + 1]),
        }
        for t, tier in enumerate(plan.tiers)
    ]


class Gathered:
    """What U heads' tokens of one piece look like: how often each code occurs in each channel, and second moments.

    Codes are those of the quantizer; of a raw float the sign and exponent, so that entropy counts its mantissa in full.
    """

    def __init__(self, bits: int, dtype: torch.dtype, moments: Moments | None) -> None:
        self.bits, self.dtype, self.moments = bits, dtype, moments
        self.tokens = 0  # of each head
        self.documents = 0
        self.counts: Tensor  # int64 [U, D, levels]
        # Sums are of differences from the first token's, or a large mean would cancel all digits of the second moments.
        self.first: Tensor  # [U, 1, D], of x
        self.first_coded: Tensor  # [U, 1, D], of codes, or of raw floats
        self.total: Tensor  # [U, D], of codes, or of raw floats
        self.outer: Tensor  # [U, D, D]
        self.powers: Tensor  # [4, U, D], sums of x, x^2, x^3, x^4

    def add(self, x: Tensor, codes: Tensor, decoded: Tensor) -> None:
        """Adds one prompt's tokens [U, n, D]."""
        heads, tokens, dim = x.shape
        levels = _levels(self.bits, self.dtype)
        exact, coded = x.double(), (decoded if self.bits == RAW_BITS else codes).double()
        if self.documents == 0:
            self.first, self.first_coded = exact[:, :1], coded[:, :1]
            self.counts = torch.zeros(heads, dim, levels, dtype=torch.int64, device=x.device)
            self.total = torch.zeros(heads, dim, dtype=torch.float64, device=x.device)
            self.outer = torch.zeros(heads, dim, dim, dtype=torch.float64, device=x.device)
            self.powers = torch.zeros(4, heads, dim, dtype=torch.float64, device=x.device)
        column = torch.arange(heads * dim, device=x.device).view(heads, 1, dim)
        found = torch.bincount((column * levels + codes).flatten(), minlength=self.counts.numel())
        self.counts += found.view_as(self.counts)
        shifted = coded - self.first_coded
        self.total += shifted.sum(1)
        self.outer += shifted.mT @ shifted
        self.tokens += tokens
        self.documents += 1
        if self.moments is not None:
            self.powers += torch.stack([(exact - self.first).pow(power).sum(1) for power in (1, 2, 3, 4)])
            self.moments.add(exact, decoded.double())

    def code_entropy_bits(self) -> Tensor:
        """Sum over channels of the entropy of their codes, for one token of each head: float64 [U]. An upper bound of H(T)."""
        mantissa = _mantissa_bits(self.dtype) if self.bits == RAW_BITS else 0
        return entropies_of_counts_bits(self.counts).add(mantissa).sum(-1)

    def total_correlation_bits(self) -> Tensor:
        """What that sum counts twice if codes are Gaussian, for one token: float64 [U]; NaN from too few tokens."""
        mean = self.total / self.tokens
        covariance = self.outer / self.tokens - mean[:, :, None] * mean[:, None, :]
        return total_correlation_or_nan_bits(regular(covariance), self.tokens).clamp(min=0)

    def misfit(self) -> Tensor:
        """Whether the mean kurtosis of the channels is improbable for a Gaussian: bool [U]."""
        first, second, third, fourth = self.powers / self.tokens
        variance = second - first**2
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        excess = (central / variance.square() - 3).nan_to_num(0).mean(-1)  # a constant channel has none
        return excess.abs() > MISFIT_DEVIATIONS * (24 / max(1, self.tokens)) ** 0.5


def gather(
    replays: Iterable[Replay],
    pieces: Mapping[Piece, Sequence[tuple[int, int]]],
    groups: int = GROUPS,
    show: str = "",
) -> dict[Piece, Gathered]:
    """Each piece of some heads, given as (layer, KV head), over all prompts. With `groups` = 0 no moments are kept.

    Memory: for each piece and head D x levels counts, and (2 * groups + 1) matrices [2 D, 2 D] of float64 at most.
    """
    found: dict[Piece, Gathered] = {}
    order = sorted(pieces, key=lambda piece: (piece.part, piece.shares))  # tokens are looked up once for all precisions
    for replay in tqdm(replays, desc=show, disable=not show, leave=False):
        context = _Context(replay)
        for piece in order:
            x = context.rows(piece, pieces[piece])
            if x.shape[1] == 0:
                continue
            codes, decoded = coded(piece, x, replay.dtype)
            if piece not in found:
                found[piece] = Gathered(piece.bits, replay.dtype, Moments(groups) if groups else None)
            found[piece].add(x, codes, decoded)
    return found


@torch.no_grad()
def coded(piece: Piece, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes int64 and decoded values fp32 of x [U, n, D], each head one run."""
    rows, lengths = x.flatten(0, 1).float(), torch.full((len(x),), x.shape[1], device=x.device)
    if piece.bits == RAW_BITS:
        roundtrip = roundtrip_keys if piece.part == "keys" else roundtrip_values
        decoded = roundtrip(piece.format, rows, lengths, RAW_BITS, dtype)
        words = decoded.to(dtype).view(torch.int16).long() & 0xFFFF
        codes = words >> _mantissa_bits(dtype)
    else:
        quantizer = getattr(get_format(piece.format), piece.part)
        codes, metadata = quantizer.quantize(rows, lengths, piece.bits, quantizer.fit(rows, lengths))
        decoded = quantizer.dequantize(codes, metadata, lengths, piece.bits)
    return codes.long().view(x.shape), decoded.view(x.shape)


class _Context:
    """One prompt's compressible tokens, ranked in each head."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.first = min(replay.pinned.sinks, replay.length)
        self.tokens = replay.pinned.compressible(replay.length)
        self.ranked = {
            i: self.first
            + replay.context(i).scores[:, self.first : self.first + self.tokens].argsort(dim=1, descending=True, stable=True)
            for i in replay.shape.compressible
        }
        self._last: tuple[object, Tensor] | None = None

    def rows(self, piece: Piece, heads: Sequence[tuple[int, int]]) -> Tensor:
        """Keys or values [U, n, D] of the tokens that the piece stores, in order of position."""
        key = (piece.part, piece.shares, tuple(heads))
        if self._last is None or self._last[0] != key:
            counts = HeadPlan(piece.format, tuple(Tier(share, 16, 16) for share in piece.shares)).counts(self.tokens)
            begin, end = sum(counts[:-1]), sum(counts)
            rows = []
            for layer, head in heads:
                taken = self.ranked[layer][head, begin:end].sort().values
                rows.append(getattr(self.replay.context(layer), piece.part)[head, taken])
            self._last = key, torch.stack(rows)
        return self._last[1]


def _mantissa_bits(dtype: torch.dtype) -> int:
    return round(-log2(torch.finfo(dtype).eps))


def _levels(bits: int, dtype: torch.dtype) -> int:
    return 2 ** (RAW_BITS - _mantissa_bits(dtype)) if bits == RAW_BITS else 2**bits
