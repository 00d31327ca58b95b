"""What tiers store: codes and decoded values of their tokens, gathered prompt by prompt in memory that does not grow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log2, nan

import torch
from ib_kernels import RAW_BITS, Bases, SideName, decode, encode, get_format, in_bases, turn
from torch import Tensor
from tqdm import tqdm

from ib_analysis.cache.plan import RAW, Head, HeadPlan, Plans, plan_of
from ib_analysis.cache.tiers import taken, tier_edges
from ib_analysis.errors import EstimatorError
from ib_analysis.estimators.dithered_channel import channel_bits
from ib_analysis.estimators.entropy import entropies_of_counts_bits
from ib_analysis.estimators.estimate import Estimator
from ib_analysis.estimators.gaussian import information_or_nan_bits, regular, total_correlation_or_nan_bits
from ib_analysis.estimators.moments import GROUPS, Moments
from ib_analysis.model.shape import CacheShape
from ib_analysis.replay.replay import Replay

SIDES: tuple[SideName, SideName] = ("keys", "values")
MISFIT_DEVIATIONS = 5.0


@dataclass(frozen=True)
class TierSide:
    """The keys, or the values, of the last of some tiers: its format and bits, and the token shares of all tiers up to it."""

    side: SideName
    format: str
    bits: int  # 16: raw floats
    token_shares: tuple[float, ...]


def sides_of(plan: HeadPlan) -> list[dict[SideName, TierSide]]:
    """The two sides of each tier of a plan."""
    return [
        {
            "keys": TierSide("keys", plan.format, tier.key_bits, plan.token_shares[: t + 1]),
            "values": TierSide("values", plan.format, tier.value_bits, plan.token_shares[: t + 1]),
        }
        for t, tier in enumerate(plan.tiers)
    ]


def all_sides(plans: Iterable[Plans], shape: CacheShape) -> dict[TierSide, list[Head]]:
    """Every side of a tier that some of these plans store, with the heads that do."""
    found: dict[TierSide, dict[Head, None]] = {}
    for rows in plans:
        for head in shape.heads:
            for sides in sides_of(plan_of(rows, head) or RAW):
                for side in sides.values():
                    found.setdefault(side, {})[head] = None
    return {side: sorted(heads) for side, heads in found.items()}


class Gathered:
    """What U heads' tokens of one side of a tier look like: how often each code occurs in each channel, and second moments.

    Codes are those of the quantizer; of a raw float the sign and exponent, so that entropy counts its mantissa in full.
    """

    def __init__(self, bits: int, dtype: torch.dtype, moments: Moments | None, samples: int = 0) -> None:
        self.bits, self.dtype, self.moments, self.samples = bits, dtype, moments, samples
        self.sampled: list[tuple[Tensor, Tensor]] = []  # of each prompt up to `samples` tokens and their decoded copies [U, n, D]
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
        if self.samples:
            chosen = torch.linspace(0, tokens - 1, min(tokens, self.samples), device=x.device).round().long()
            self.sampled.append((x[:, chosen].float(), decoded[:, chosen].float()))
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

    def gaussian_bits(self) -> tuple[Tensor, Tensor]:
        """I_G of a token and its decoded copy, and half of the width of its 95% interval: [U] each; NaN from too few tokens."""
        assert self.moments is not None
        dim = self.counts.shape[1]
        return self.moments.jackknife(lambda covariance, count: information_or_nan_bits(regular(covariance), dim, count))

    def dithered_bits(self) -> Tensor:
        """The Gaussian value of the dithered channel of a token and its decoded copy: [U]; NaN from one token."""
        assert self.moments is not None
        covariance, count = self.moments.covariance()
        if count < 2:
            return torch.full(covariance.shape[:-2], torch.nan, dtype=covariance.dtype, device=covariance.device)
        return channel_bits(covariance, count)

    def estimated_bits(self, estimator: Estimator) -> Tensor:
        """What an estimator says of a sampled token and its decoded copy: float64 [U]; NaN where it declines."""
        x, decoded = (torch.cat([pair[i] for pair in self.sampled], dim=1).cpu() for i in (0, 1))  # [U, N, D]
        documents = torch.cat([torch.full((pair[0].shape[1],), i) for i, pair in enumerate(self.sampled)])
        return torch.tensor([_estimate(estimator, *pair, documents) for pair in zip(x, decoded)], dtype=torch.float64)

    def misfit(self) -> Tensor:
        """Whether the mean kurtosis of the channels is improbable for a Gaussian: bool [U]."""
        first, second, third, fourth = self.powers / self.tokens
        variance = second - first**2
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        excess = (central / variance.square() - 3).nan_to_num(0).mean(-1)  # a constant channel has none
        return excess.abs() > MISFIT_DEVIATIONS * (24 / max(1, self.tokens)) ** 0.5


def gather(
    replays: Iterable[Replay],
    sides: Mapping[TierSide, Sequence[Head]],
    groups: int = GROUPS,
    show: str = "",
    samples: int = 0,
) -> dict[TierSide, Gathered]:
    """Each side of a tier of some heads over all prompts. With `groups` = 0 no moments are kept, with `samples` so many tokens
    of each prompt.

    Memory: for each side and head D x levels counts, and (2 * groups + 1) matrices [2 D, 2 D] of float64 at most.
    """
    found: dict[TierSide, Gathered] = {}
    order = sorted(sides, key=lambda side: (side.side, side.token_shares))  # tokens are looked up once for all precisions
    for replay in tqdm(replays, desc=show, leave=False) if show else replays:
        context = _Context(replay)
        for side in order:
            x = context.rows(side, sides[side])
            if x.shape[1] == 0:
                continue
            bases = replay.spec.bases if in_bases(side.format, side.side, side.bits) else None
            codes, decoded = coded(side, x, replay.dtype, None if bases is None else bases.of(sides[side]).to(x.device))
            if side not in found:
                found[side] = Gathered(side.bits, replay.dtype, Moments(groups) if groups else None, samples)
            found[side].add(x, codes, decoded)
    return found


@torch.no_grad()
def coded(side: TierSide, x: Tensor, dtype: torch.dtype, bases: Bases | None = None) -> tuple[Tensor, Tensor]:
    """Codes int64 and decoded values fp32 of x [U, n, D], each head one run; with the `bases` of the heads in these."""
    rows, lengths = x.flatten(0, 1).float(), torch.full((len(x),), x.shape[1], device=x.device)
    quantizer = getattr(get_format(side.format), side.side)
    codes, metadata = encode(quantizer, rows if bases is None else turn(rows, lengths, bases.into), lengths, side.bits, dtype)
    decoded = decode(quantizer, codes, metadata, lengths, side.bits)
    decoded = decoded if bases is None else turn(decoded, lengths, bases.back)
    if side.bits == RAW_BITS:
        codes = (codes.view(torch.int16).long() & 0xFFFF) >> _mantissa_bits(dtype)
    return codes.long().view(x.shape), decoded.view(x.shape)


def _estimate(estimator: Estimator, x: Tensor, decoded: Tensor, documents: Tensor) -> float:
    try:
        return float(estimator.estimate(x, decoded, documents).bits)
    except EstimatorError:
        return nan


class _Context:
    """One prompt's compressible tokens, as tiers take them."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self._last: tuple[object, Tensor] | None = None

    def rows(self, side: TierSide, heads: Sequence[Head]) -> Tensor:
        """Keys or values [U, n, D] of the tokens that the last tier stores, in order of position."""
        key = (side.side, side.token_shares, tuple(heads))
        if self._last is None or self._last[0] != key:
            *_, begin, end = tier_edges(side.token_shares, self.replay.tokens)
            rows = []
            for layer, head in heads:
                tokens = taken(self.replay.ranks[layer][head], begin, end)
                rows.append(getattr(self.replay.context(layer), side.side)[head, tokens].to(self.replay.example.prefill.device))
            self._last = key, torch.stack(rows)
        return self._last[1]


def _mantissa_bits(dtype: torch.dtype) -> int:
    return round(-log2(torch.finfo(dtype).eps))


def _levels(bits: int, dtype: torch.dtype) -> int:
    return 2 ** (RAW_BITS - _mantissa_bits(dtype)) if bits == RAW_BITS else 2**bits
