"""What a cache keeps: tiers of tokens and bits for every KV head, and the tokens that every head keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from ib_kernels import FORMATS, RAW_BITS, get_format, tokens_nbytes
from ib_kernels.formats.format import check_precision

from ib_analysis.cache.tiers import Count, tier_counts, tier_edges

Form = tuple[str, int, int]  # format, key bits, value bits

BITS = (2, 3, 4, 8)
FULL = (RAW_BITS, RAW_BITS)
SLACK = 1e-9  # of shares, which are rounded
MAX_LENGTH = 2**31 - 1  # of a context, in tokens
WINDOW_SHARE, QUANTIZED_SHARE = 1 / 8, 1 / 8  # of a budget that sinks and window, and the quantized window, may take
MAX_SINKS, MAX_WINDOW, MAX_FLUSH, MAX_QUANTIZED = 4, 32, 16, 128
MIN_QUANTIZED = 4  # fewer are not worth what a head stores once for them
QUANTIZED_FORM: Form = ("rotated", 4, 4)  # of tokens in the quantized window
QUANTIZED_PER_TOKEN = 3.5  # so many of these tokens, with scales and centres, take no more bytes than one at 16 bits


@dataclass(frozen=True)
class Tier:
    """A share of a head's compressible tokens, stored at these precisions (2, 3, 4, 8, or 16 for none).

    Raises ValueError for what cannot be stored.
    """

    token_share: float
    key_bits: int
    value_bits: int

    def __post_init__(self) -> None:
        if not 0 < self.token_share <= 1:
            raise ValueError(f"a tier takes a share of tokens in (0, 1], not {self.token_share!r}")
        check_precision(self.key_bits)
        check_precision(self.value_bits)


@dataclass(frozen=True)
class HeadPlan:
    """Tiers of one KV head, the tokens that score highest in the first; what no tier takes is evicted.

    Raises ValueError for a format that does not exist, and for tiers that take more than all tokens.
    """

    format: str
    tiers: tuple[Tier, ...] = ()

    def __post_init__(self) -> None:
        get_format(self.format)
        if self.kept_share > 1 + SLACK:
            raise ValueError(f"the tiers of a head take {self.kept_share:.4g} of its tokens, more than all")

    @property
    def token_shares(self) -> tuple[float, ...]:
        return tuple(tier.token_share for tier in self.tiers)

    @property
    def kept_share(self) -> float:
        return sum(self.token_shares)

    def counts(self, tokens: Count) -> list[Count]:
        """How many of `tokens` compressible tokens each tier takes."""
        return tier_counts(self.token_shares, tokens)

    def edges(self, tokens: Count, before: Count | None = None) -> list[Count]:
        """Ranks between which each tier takes its tokens (see `tier_edges`)."""
        return tier_edges(self.token_shares, tokens, before)

    def nbytes(self, tokens: Count, head_dim: int) -> Count:
        """Exact bytes of this head in a cache with `tokens` compressible tokens."""
        total = tokens * 0
        for tier, count in zip(self.tiers, self.counts(tokens)):
            total = total + tokens_nbytes(self.format, count, head_dim, tier.key_bits, tier.value_bits)
        return total * (tokens > 0)  # nothing is stored before there is anything to compress

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> HeadPlan:
        """From what `dataclasses.asdict` made of it; version 1 called a token share a share."""
        tiers = ({("token_share" if key == "share" else key): value for key, value in tier.items()} for tier in content["tiers"])
        return cls(content["format"], tuple(Tier(**tier) for tier in tiers))


Plans = tuple[tuple[HeadPlan, ...] | None, ...]  # one row for each layer; None for a layer that is left as it is
LayerPlans = Sequence[HeadPlan | None] | None  # what the heads of one layer are given, some of which may be left as they are
PlansToTry = Sequence[LayerPlans]
Head = tuple[int, int]  # layer, KV head

EVICTED = HeadPlan(next(iter(FORMATS)))
RAW = HeadPlan(next(iter(FORMATS)), (Tier(1.0, *FULL),))  # all tokens at 16 bits, in packed storage


def forms_of(plans: tuple[HeadPlan, ...]) -> list[tuple[Form, list[tuple[int, int]]]]:
    """For each part the form of its tokens, and its (head, tier)s. A head that has a form twice is in two parts."""
    forms: dict[tuple[Form, int], list[tuple[int, int]]] = {}
    for h, head in enumerate(plans):
        seen: Counter[Form] = Counter()
        for t, tier in enumerate(head.tiers):
            form = (head.format, tier.key_bits, tier.value_bits)
            forms.setdefault((form, seen[form]), []).append((h, t))
            seen[form] += 1
    return [(form, tiers) for (form, _), tiers in forms.items()]


def plan_of(plans: Plans, head: Head) -> HeadPlan | None:
    """The plan of one head; None in a layer that is left at full precision."""
    row = plans[head[0]]
    return None if row is None else row[head[1]]


def precisions(formats: Iterable[str]) -> list[tuple[str, tuple[int, int]]]:
    """Every (format, (key bits, value bits)) of these formats; at 16 bits there is nothing to format."""
    packed = [(fmt, bits) for fmt in formats for bits in product(BITS, BITS)]
    return [*packed, (RAW.format, FULL)]


@dataclass(frozen=True)
class Recent:
    """What every head keeps: the first `sinks` tokens and at least `window` recent ones at 16 bits (the residual window), and
    behind these `quantized` ones of 4 bits.

    Tokens leave the window `flush` at a time, at the same lengths whether they came in one block or one by one. As many leave the
    quantized window, once it is full: they are compressible.
    """

    sinks: int
    window: int
    flush: int
    quantized: int = 0

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("window", 0), ("flush", 1), ("quantized", 0)):
            number = getattr(self, name)
            if not isinstance(number, int) or not least <= number <= MAX_LENGTH:
                raise ValueError(f"{name} is a whole number of tokens, {least} or more, not {number!r}")

    def __str__(self) -> str:
        window = str(self.window) if self.flush == 1 else f"{self.window} to {self.window + self.flush - 1}"
        sinks = "1 sink" if self.sinks == 1 else f"{self.sinks} sinks"
        quantized = f", {self.quantized} before these at {QUANTIZED_FORM[1]} bits" if self.quantized else ""
        return f"{sinks} and the {window} newest tokens at 16 bits{quantized}"

    @classmethod
    def within(cls, share: float, context_length: int) -> Recent:
        """An eighth of a budget at 16 bits and an eighth quantized, rounded, if that is not more than is of use; at least a sink
        and a token of the window."""
        tokens = round(WINDOW_SHARE * share * context_length)
        sinks = min(MAX_SINKS, max(1, tokens // 4))
        flush = min(MAX_FLUSH, max(1, tokens // 4))
        quantized = int(QUANTIZED_SHARE * share * context_length * QUANTIZED_PER_TOKEN)
        quantized = 0 if quantized < MIN_QUANTIZED else min(MAX_QUANTIZED, quantized)
        return cls(sinks, min(MAX_WINDOW, max(1, tokens - sinks - flush + 1)), flush, quantized)

    @property
    def max_tokens(self) -> int:
        """The largest number of tokens at 16 bits."""
        return self.sinks + self.window + self.flush - 1

    def past_window(self, length: Count) -> Count:
        """How many tokens of a cache of `length` tokens have left the 16-bit window, sinks aside."""
        beyond = np.maximum(np.asarray(length) - self.sinks - self.window, 0) // self.flush * self.flush
        return int(beyond) if isinstance(length, int) else beyond

    def compressible(self, length: Count) -> Count:
        """How many of these have left the quantized window, too."""
        beyond = np.maximum(np.asarray(self.past_window(length)) - self.quantized, 0)
        return int(beyond) if isinstance(length, int) else beyond

    def before_leaving(self, length: int) -> int:
        """The first length from this one on at which one more token makes some leave the window."""
        return length + (self.max_tokens - length) % self.flush
