"""Budgets: every unit, and every refusal."""

import math
from contextlib import suppress
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ib_analysis.errors import BudgetError
from ib_analysis.search.budget import Budget, parse_budget

CONSTRUCTORS = ("Budget.share(", "Budget.bits(", "Budget.bytes(", "Budget.tokens(")
NOT_A_SHARE = [
    0,
    0.0,
    -0.5,
    float("nan"),
    float("inf"),
    -float("inf"),
    2,
    1.0001,
    "12",
    "1/8",
    "0.5",
    True,
    False,
    None,
]
NOT_A_SHARE += [[0.5], 1j, np.float32("nan"), np.array(0.5), 10**400, -(10**400), Fraction(1, 10**400)]
NOT_BITS = [0, -1, 16.5, float("nan"), float("inf"), True, None, "2"]
NOT_A_COUNT = [0, -1, 1.5, float("nan"), float("inf"), True, None, 2**63]
NOT_A_SIZE = [*NOT_A_COUNT, "", "64", "64Mb", "64 mib", "-1MB", "1e3B", "0B", "0.4B", "GiB", "99999999999999999GB"]
NOT_A_TEXT = [
    "",
    "0",
    "0/3",
    "1/0",
    "2",
    "12",
    "-1",
    "9/8",
    "nan",
    "inf",
    "1e-1",
    "1_0",
    "50%",
    "1/8/8",
    "0bits",
    "17bits",
]
NOT_A_TEXT += [
    "64MiB",
    "64@8192",
    "64MiB@0",
    "64MiB@",
    "@8192",
    "64MiB@1.5",
    "0x4bits",
    "512x0bits",
    "512x17bits",
    "512x4",
]
NOT_A_TEXT += ["9" * 5000, "None", "Budget.share(1/8)"]


@given(st.floats(0, 1, exclude_min=True))
def test_share_is_itself(share: float) -> None:
    assert Budget.share(share).as_share(4096, 1000) == share
    assert Budget.of(share) == Budget.share(share)
    assert Budget.of(Budget.of(share)) == Budget.share(share)


@pytest.mark.parametrize("share", [1, np.float32(0.125), np.float64(0.125), np.int64(1), Fraction(1, 8)])
def test_share_takes_every_real_number(share: float) -> None:
    assert Budget.of(share).as_share(1, 1) == float(share)


@given(st.floats(1e-300, 16))
def test_bits_are_a_share_of_sixteen(bits: float) -> None:
    assert Budget.bits(bits).as_share(4096, 1000) == bits / 16


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.data())
def test_bytes_are_taken_at_their_own_context(bytes_per_token: int, context: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, bytes_per_token * context))
    budget = Budget.bytes(size, context=context)
    assert budget.as_share(bytes_per_token, 7) == size / (bytes_per_token * context)
    with pytest.raises(BudgetError, match=r"use Budget.share\(1\)"):
        Budget.bytes(bytes_per_token * context + 1, context=context).as_share(bytes_per_token, 10 * context)


@given(st.integers(1, 10**6), st.integers(1, 16), st.data())
def test_tokens_depend_on_the_context(context: int, bits: int, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, context))
    share = Budget.tokens(tokens, bits=bits).as_share(4096, context)
    assert share == pytest.approx(tokens * bits / (16 * context))
    with pytest.raises(BudgetError, match=r"use Budget.share\(1\)"):
        Budget.tokens(16 * context + 1, bits=bits).as_share(4096, context)


@pytest.mark.parametrize(
    ("size", "size_bytes"),
    [("64MiB", 2**26), ("1.5GB", 1_500_000_000), ("300kB", 300_000), (" 2 KiB ", 2048), ("1GiB", 2**30), ("7B", 7)],
)
def test_sizes(size: str, size_bytes: int) -> None:
    assert Budget.bytes(size, context=10) == Budget.bytes(size_bytes, context=10)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget.share(1 / 8), "1/8 of the 16-bit cache"),
        (Budget.share(0.3), "3/10 of the 16-bit cache"),
        (Budget.share(1 / 1000), "1/1000 of the 16-bit cache"),
        (Budget.share(0.1234567), "0.123457 of the 16-bit cache"),
        (Budget.share(1), "the whole 16-bit cache"),
        (Budget.bits(2), "2 bits per element"),
        (Budget.bits(1), "1 bit per element"),
        (Budget.bits(2.5), "2.5 bits per element"),
        (Budget.bytes("64MiB", context=8192), "64.0 MiB at 8192 tokens"),
        (Budget.bytes(100, context=1), "100 B at 1 token"),
        (Budget.tokens(512, bits=4), "512 tokens at 4 bits"),
    ],
)
def test_text_has_the_unit(budget: Budget, text: str) -> None:
    assert str(budget) == text


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("1/8", Budget.share(1 / 8)),
        (" 1 / 8 ", Budget.share(1 / 8)),
        ("0.125", Budget.share(1 / 8)),
        (".5", Budget.share(0.5)),
        ("1", Budget.share(1)),
        ("2bits", Budget.bits(2)),
        ("1 bit", Budget.bits(1)),
        ("2.5bits", Budget.bits(2.5)),
        ("64MiB@8192", Budget.bytes("64MiB", context=8192)),
        ("1.5GB @ 100000", Budget.bytes("1.5GB", context=100_000)),
        ("512x4bits", Budget.tokens(512, bits=4)),
    ],
)
def test_command_line(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_command_line_reads_every_fraction(numerator: int, more: int) -> None:
    assert parse_budget(f"{numerator}/{numerator + more}") == Budget.share(numerator / (numerator + more))


@pytest.mark.parametrize("value", NOT_A_SHARE, ids=lambda value: repr(value)[:20])
def test_a_number_without_unit_is_a_share_or_refused(value: object) -> None:
    for refuse in (Budget.of, Budget.share):
        with pytest.raises(BudgetError) as error:
            refuse(value)  # type: ignore[arg-type]
        assert all(part in str(error.value) for part in (repr(value), *CONSTRUCTORS))


@pytest.mark.parametrize("value", NOT_BITS, ids=repr)
def test_bad_bits(value: float) -> None:
    with pytest.raises(BudgetError, match=r"\(0, 16\]"):
        Budget.bits(value)
    with pytest.raises(BudgetError, match=r"\(0, 16\]"):
        Budget.tokens(512, bits=value)


@pytest.mark.parametrize("value", NOT_A_COUNT, ids=repr)
def test_bad_tokens_and_contexts(value: int) -> None:
    with pytest.raises(BudgetError, match=r"Budget\.tokens"):
        Budget.tokens(value, bits=4)
    with pytest.raises(BudgetError, match=r"Budget\.bytes"):
        Budget.bytes("64MiB", context=value)
    with pytest.raises(BudgetError, match="bytes_per_token"):
        Budget.bytes(1, context=1).as_share(value, 1)
    with pytest.raises(BudgetError, match="context_length"):
        Budget.tokens(1, bits=4).as_share(1, value)


def test_a_context_that_no_plan_could_be_checked_at() -> None:
    Budget.bytes("64MiB", context=2**24)
    with pytest.raises(BudgetError, match="16,777,216 tokens, not 16777217"):
        Budget.bytes("64MiB", context=2**24 + 1)


@pytest.mark.parametrize("value", NOT_A_SIZE, ids=repr)
def test_bad_sizes(value: int | str) -> None:
    with pytest.raises(BudgetError) as error:
        Budget.bytes(value, context=8192)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("text", NOT_A_TEXT, ids=lambda text: text[:20])
def test_bad_command_lines(text: str) -> None:
    with pytest.raises(BudgetError) as error:
        parse_budget(text)
    assert all(part in str(error.value) for part in CONSTRUCTORS)


@given(st.text(max_size=20))
def test_command_line_gives_a_budget_or_a_budget_error(text: str) -> None:
    with suppress(BudgetError):
        assert isinstance(parse_budget(text), Budget)


@pytest.mark.parametrize(
    "fields",
    [("foo", 0.5), ("share", math.nan), ("share", 0), ("bits", math.inf), ("bytes", 100), ("tokens", 100), ("bytes", 0, 10)],
)
def test_a_budget_by_hand_is_whole_or_refused(fields: tuple[Any, ...]) -> None:
    with pytest.raises(BudgetError):
        Budget(*fields)
