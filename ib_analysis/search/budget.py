"""A memory budget for a KV cache, always with its unit."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Literal

from ib_analysis.errors import BudgetError

FULL_BITS = 16
MAX_CONTEXT = 2**24  # tokens; plans are tried at every length up to it
_BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_NUMBER = r"(?:[0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})"
_CONSTRUCTORS = 'Budget.share(1/8), Budget.bits(2), Budget.bytes("64MiB", context=8192) or Budget.tokens(512, bits=4)'


@dataclass(frozen=True)
class Budget:
    """How much memory a KV cache may take, metadata included. Build one with a constructor below or `Budget.of`."""

    unit: Literal["share", "bits", "bytes", "tokens"]
    amount: float
    context_length: int | None = None  # of "bytes": the context length at which the cache takes them
    token_bits: float | None = None  # of "tokens": the precision of one element

    def __post_init__(self) -> None:
        if self.unit not in ("share", "bits", "bytes", "tokens"):
            raise _error("a budget's unit is share, bits, bytes or tokens", self.unit)
        needs = {"bytes": self.context_length, "tokens": self.token_bits}
        if needs.get(self.unit, 1) is None or not 0 < self.amount < math.inf:
            raise _error("a budget has an amount above 0, in bytes a context_length, in tokens token_bits", self)

    @classmethod
    def share(cls, share: float) -> "Budget":
        """A share of the full 16-bit cache, in (0, 1]."""
        return cls("share", _number(share, 1, "Budget.share takes a share of the full 16-bit cache in (0, 1]"))

    @classmethod
    def bits(cls, bits: float) -> "Budget":
        """Effective bits per element of the full cache, in (0, 16]."""
        return cls("bits", _number(bits, FULL_BITS, "Budget.bits takes bits per element in (0, 16]"))

    @classmethod
    def bytes(cls, size: int | str, context: int) -> "Budget":
        """Bytes of one sequence's cache at `context` tokens: an integer, or a string as "64MiB", "1.5GB", "300kB"."""
        size_bytes = _parse_size(size) if isinstance(size, str) else size
        amount = _count(size_bytes, 'Budget.bytes takes at least one byte, as 2**26, "64MiB" or "1.5GB"', given=size)
        allowed = f"Budget.bytes takes a context of 1 to {MAX_CONTEXT:,} tokens"
        length = _count(context, allowed)
        if length > MAX_CONTEXT:
            raise _error(allowed, context)
        return cls("bytes", amount, context_length=length)

    @classmethod
    def tokens(cls, tokens: int, bits: float) -> "Budget":
        """What `tokens` tokens a head take at `bits` bits per element, in (0, 16]; the share depends on the context."""
        amount = _count(tokens, "Budget.tokens takes a whole number of tokens, at least one")
        token_bits = _number(bits, FULL_BITS, "Budget.tokens takes bits per element in (0, 16]")
        return cls("tokens", amount, token_bits=token_bits)

    @classmethod
    def of(cls, value: object) -> "Budget":
        """A `Budget` as it is, or a bare number in (0, 1] as a share of the 16-bit cache; else raises BudgetError."""
        if isinstance(value, Budget):
            return value
        return cls("share", _number(value, 1, "a budget without a unit is a share of the full 16-bit cache in (0, 1]"))

    def as_share(self, bytes_per_token: int, context_length: int) -> float:
        """The budget as a share of the full 16-bit cache, in (0, 1].

        `bytes_per_token` are the bytes of one token over all layers of the full 16-bit cache. `context_length`, in
        tokens, matters to a budget in tokens only: a budget in bytes is taken at its own context length.
        Raises BudgetError if the budget exceeds the full cache.
        """
        share = Fraction(self.amount)
        if self.unit == "bits":
            share /= FULL_BITS
        elif self.unit == "bytes":
            full = _count(bytes_per_token, "bytes_per_token is a whole number of bytes, at least one")
            share /= full * (self.context_length or 1)
        elif self.unit == "tokens":
            length = _count(context_length, "context_length is a whole number of tokens, at least one")
            share *= Fraction(self.token_bits or 0) / (FULL_BITS * length)
        if share > 1:
            raise BudgetError(f"a budget of {self} is more than the full 16-bit cache: use Budget.share(1)")
        return float(share)

    def __str__(self) -> str:
        if self.unit == "share":
            return _share_text(self.amount)
        if self.unit == "bits":
            return f"{_plural(self.amount, 'bit')} per element"
        if self.unit == "bytes":
            return f"{_size_text(self.amount)} at {_plural(self.context_length or 0, 'token')}"
        return f"{_plural(self.amount, 'token')} at {_plural(self.token_bits or 0, 'bit')}"


def parse_budget(text: str) -> Budget:
    """A budget written as "1/8", "0.125", "2bits", "64MiB@8192" or "512x4bits"; else raises BudgetError."""
    compact = "".join(text.split())
    if match := re.fullmatch(rf"({_NUMBER})(?:/([0-9]{{1,18}}))?", compact):
        numerator, denominator = Fraction(match[1]), int(match[2] or 1)
        return Budget.share(float(numerator / denominator) if denominator else math.inf)
    if match := re.fullmatch(rf"({_NUMBER})bits?", compact):
        return Budget.bits(float(match[1]))
    if match := re.fullmatch(r"(.+)@([0-9]{1,18})", compact):
        return Budget.bytes(match[1], context=int(match[2]))
    if match := re.fullmatch(rf"([0-9]{{1,18}})x({_NUMBER})bits?", compact):
        return Budget.tokens(int(match[1]), bits=float(match[2]))
    raise _error("a budget reads 1/8, 0.125, 2bits, 64MiB@8192 or 512x4bits", text)


def _number(value: object, upper: float, what: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or value <= 0 or not value <= upper or float(value) == 0:
        raise _error(what, value)
    return float(value)


def _count(value: object, what: str, given: object = None) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value <= 0 or not value < 2**63:
        raise _error(what, value if given is None else given)
    return int(value)


def _error(what: str, value: object) -> BudgetError:
    return BudgetError(f"{what}, not {value!r}; in Python: {_CONSTRUCTORS}")


def _parse_size(text: str) -> int:
    match = re.fullmatch(rf"({_NUMBER})\s*([A-Za-z]+)", text.strip())
    if match is None or match[2] not in _BYTES:
        raise _error(f"a size in bytes is a number with one of {', '.join(_BYTES)}", text)
    return int(Fraction(match[1]) * _BYTES[match[2]])


def _share_text(share: float) -> str:
    if share == 1:
        return "the whole 16-bit cache"
    for ratio in (Fraction(1, round(1 / share)), Fraction(share).limit_denominator(64)):
        if math.isclose(ratio, share, rel_tol=1e-12):
            return f"{ratio} of the 16-bit cache"
    return f"{share:g} of the 16-bit cache"


def _size_text(size: float) -> str:
    for unit in ("GiB", "MiB", "KiB"):
        if size >= _BYTES[unit]:
            return f"{size / _BYTES[unit]:.1f} {unit}"
    return f"{size:.0f} B"


def _plural(amount: float, noun: str) -> str:
    number = str(amount) if isinstance(amount, int) else format(amount, "g")
    return f"{number} {noun}{'' if amount == 1 else 's'}"
