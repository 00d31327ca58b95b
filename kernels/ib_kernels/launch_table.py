"""How each variant of attention to packed tokens is compiled: the first row of a table that fits what is asked.

Found by compiling all variants (kernels/benchmarks/compile.py), so that none spills registers. A GPU core holds 16 programs of a
warp with 128 registers, 12 with up to 168 and 8 with more: the more, the faster. What a program reads at a time, M query rows
and N tokens, is what its registers hold.
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from ib_kernels.formats.format import Scales

MAX_NARROW_ROWS = 8  # query rows that the narrow side of a matrix instruction holds

Condition = Container[int] | Container[str] | None  # what fits; None if all does


class Asked(NamedTuple):
    """What attention is asked for."""

    scales: Scales  # what has a scale (see `Kernels`)
    head_dim: int
    key_bits: int
    value_bits: int
    many_rows: bool  # whether a pair has more than MAX_NARROW_ROWS query rows
    fp32: bool  # the query
    softcap: bool
    capability: int  # 80, 90, 100, ...


class Row(NamedTuple):
    """What is compiled for all that is asked and fits: a condition for each field of `Asked`, in its order, then the answer."""

    scales: Condition
    head_dims: Condition
    key_bits: Condition
    value_bits: Condition
    many_rows: Condition
    fp32: Condition
    softcap: Condition
    capabilities: Condition
    M: int
    N: int
    num_warps: int
    num_stages: int
    maxnreg: int

    def fits(self, asked: Asked) -> bool:
        return all(condition is None or one in condition for condition, one in zip(self[: len(asked)], asked))  # type: ignore[operator]


ANY = None
YES, NO = (True,), (False,)
GROUPS, TOKENS, QUARTERS = ("groups",), ("tokens",), ("quarters",)
POW2 = (16, 32, 64, 128)
ODD = (48, 80, 96, 112)  # head_dims that are no power of two
LARGE = range(144, 257, 16)
ALL_ODD = (*ODD, *LARGE[:-1])
OLD, NEW = range(100), range(100, 1000)  # GPUs before Blackwell, and from it on

# fmt: off
TABLE = (
    #   scales  head_dim    keys    values     rows>8 fp32 softcap GPU  M   N  warps stages registers
    Row(QUARTERS, LARGE,    ANY,    (3,),      ANY,   ANY, ANY,    ANY, 8,  32, 2, 2, 255),
    Row(QUARTERS, LARGE,    ANY,    ANY,       ANY,   ANY, ANY,    NEW, 8,  32, 2, 2, 255),
    Row(QUARTERS, ODD,      (3, 8), (3, 4, 8), ANY,   ANY, ANY,    ANY, 8,  32, 2, 2, 255),
    Row(QUARTERS, (128,),   ANY,    (2,),      ANY,   ANY, YES,    NEW, 8,  32, 2, 2, 255),
    Row(QUARTERS, ANY,      ANY,    ANY,       ANY,   ANY, ANY,    ANY, 8,  32, 1, 2, 255),
    Row(TOKENS, ANY,        (3,),   ANY,       ANY,   ANY, ANY,    ANY, 8,  32, 1, 2, 255),
    Row(TOKENS, ANY,        ANY,    (3,),      ANY,   ANY, ANY,    ANY, 8,  32, 1, 2, 255),
    Row(TOKENS, (256,),     (2, 4), (2, 4),    ANY,   ANY, NO,     OLD, 8,  32, 1, 2, 168),
    Row(TOKENS, LARGE,      ANY,    ANY,       ANY,   ANY, ANY,    ANY, 8,  32, 1, 2, 255),
    Row(TOKENS, ODD,        ANY,    ANY,       ANY,   ANY, ANY,    ANY, 8,  64, 1, 2, 255),
    Row(TOKENS, POW2,       ANY,    ANY,       YES,   ANY, ANY,    ANY, 16, 32, 1, 2, 255),
    Row(TOKENS, POW2,       (4,),   (2, 4),    ANY,   ANY, NO,     OLD, 8,  32, 1, 3, 128),
    Row(TOKENS, (128,),     (4,),   (2, 4),    ANY,   ANY, NO,     ANY, 8,  32, 1, 3, 168),
    Row(TOKENS, POW2,       (4,),   (2, 4),    ANY,   ANY, ANY,    ANY, 8,  32, 1, 2, 255),
    Row(TOKENS, POW2,       (2,),   (2, 4),    ANY,   ANY, NO,     OLD, 8,  64, 1, 3, 168),
    Row(TOKENS, (128,),     (2,),   (2,),      ANY,   ANY, NO,     ANY, 8,  64, 1, 3, 168),
    Row(TOKENS, POW2,       ANY,    ANY,       ANY,   ANY, ANY,    ANY, 8,  64, 1, 2, 255),
    Row(GROUPS, ALL_ODD,    (2,),   (3,),      ANY,   YES, ANY,    ANY, 8,  32, 2, 1, 255),
    Row(GROUPS, LARGE,      ANY,    ANY,       ANY,   ANY, ANY,    ANY, 8,  32, 2, 2, 255),
    Row(GROUPS, ODD,        (2, 4), (2, 4, 8), ANY,   NO,  NO,     OLD, 8,  32, 1, 3, 255),
    Row(GROUPS, ODD,        (8,),   (2, 4),    ANY,   NO,  NO,     OLD, 8,  32, 1, 3, 255),
    Row(GROUPS, ODD,        ANY,    ANY,       ANY,   ANY, ANY,    ANY, 8,  32, 2, 2, 255),
    Row(GROUPS, (128,),     (3,),   ANY,       ANY,   YES, ANY,    ANY, 8,  32, 2, 1, 255),
    Row(GROUPS, (128,),     (3,),   ANY,       ANY,   ANY, YES,    ANY, 8,  32, 2, 1, 255),
    Row(GROUPS, POW2,       (3,),   ANY,       ANY,   ANY, ANY,    ANY, 8,  32, 1, 1, 255),
    Row(GROUPS, POW2,       (2, 4), (2, 4, 8), ANY,   NO,  NO,     OLD, 8,  32, 1, 3, 168),
    Row(GROUPS, POW2,       ANY,    ANY,       ANY,   ANY, ANY,    ANY, 8,  32, 1, 3, 255),
)
# fmt: on


def find(asked: Asked) -> Row:
    """The row of what is asked, for a head_dim that is a multiple of 16 up to 256."""
    return next(row for row in TABLE if row.fits(asked))
