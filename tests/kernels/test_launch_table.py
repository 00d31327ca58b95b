"""The launch table against what was found by compiling all variants, kernels/benchmarks/compiled.csv."""

import csv
from itertools import product
from pathlib import Path
from typing import get_args

import pytest

pytest.importorskip("triton")

from compile import BITS, CAPABILITIES, HEAD_DIMS, MAX_REGISTERS, variants
from ib_kernels.formats.format import Scales
from ib_kernels.launch_table import TABLE, Asked, find

COMPILED = Path(__file__).parents[2] / "kernels" / "benchmarks" / "compiled.csv"
FLAGS = (False, True)


@pytest.fixture(scope="module")
def compiled():
    """Lines of the file, by (target, kernel)."""
    with COMPILED.open(newline="") as file:
        return {(line["target"], line["kernel"]): line for line in csv.DictReader(file)}


@pytest.fixture(scope="module")
def launched():
    """All variants, by (target, kernel)."""
    return {
        (f"sm_{capability}", variant.name): variant
        for capability, head_dim in product(CAPABILITIES, HEAD_DIMS)
        for variant in variants(capability, head_dim, BITS)
    }


def test_what_was_compiled_is_what_is_launched(compiled, launched):
    assert compiled.keys() == launched.keys()


def test_no_variant_has_faults_or_more_registers_than_it_may_have(compiled, launched):
    for key, line in compiled.items():
        assert line["faults"] == "" and line["stack"] == "0", key
        assert int(line["registers"]) <= (launched[key].launch.get("maxnreg") or MAX_REGISTERS), key


def test_all_that_can_be_asked_has_a_row_and_no_row_is_idle():
    capabilities = (0, *CAPABILITIES, 120)
    asked = product(get_args(Scales), range(16, 257, 16), BITS, BITS, FLAGS, FLAGS, FLAGS, capabilities)
    assert {find(Asked(*some)) for some in asked} == set(TABLE)


@pytest.mark.parametrize(
    ("asked", "launch"),
    [
        (Asked("tokens", 128, 4, 4, False, True, False, 90), (8, 32, 1, 3, 128)),
        (Asked("tokens", 128, 2, 2, False, True, False, 90), (8, 64, 1, 3, 168)),
        (Asked("tokens", 128, 4, 4, True, True, False, 90), (16, 32, 1, 2, 255)),
        (Asked("tokens", 128, 4, 4, False, True, False, 100), (8, 32, 1, 3, 168)),
        (Asked("groups", 128, 4, 4, False, False, False, 90), (8, 32, 1, 3, 168)),
        (Asked("groups", 128, 3, 3, False, True, False, 90), (8, 32, 2, 1, 255)),
        (Asked("groups", 96, 2, 3, False, True, False, 80), (8, 32, 2, 1, 255)),
    ],
)
def test_first_row_that_fits(asked, launch):
    row = find(asked)
    assert (row.M, row.N, row.num_warps, row.num_stages, row.maxnreg) == launch
