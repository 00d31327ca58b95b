"""The assembly of spectral logits, which no interpreter runs: emulated here, against the numbers that it should give."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from ib_kernels import bitpack
from ib_kernels.formats.spectral.logits import CENTRE_CODES, JOIN_THREE_BITS, JOIN_TWO_BITS, quarters, spending
from ib_kernels.formats.spectral.reference import PATTERNS, _join

OPERATIONS: dict[str, Callable[..., int]] = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "shf.r.wrap.b32": lambda a, b, c: a >> (c & 31) | b << (-c & 31) if c & 31 else a,
    "lop3.b32": lambda a, b, c, table: sum(
        (table >> 4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1) & 1) << i for i in range(32)
    ),
    "sub.rn.f16x2": lambda a, b: pair(halves(a).view(np.float16) - halves(b).view(np.float16)),
}


def halves(register):
    return np.array([register & 0xFFFF, register >> 16], dtype=np.uint16)


def pair(low_and_high):
    low, high = low_and_high.view(np.uint16).tolist()
    return low | high << 16


def emulated(assembly, *inputs):
    """What the assembly leaves in $0, for inputs $1, $2, ... of 32 bits each."""
    registers = {f"${i}": value for i, value in enumerate(inputs, 1)}
    for line in assembly.strip("{}").split(";"):
        words = line.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        operands = [registers[word] if word in registers else int(word, 0) for word in words[2:]]
        registers[words[1]] = OPERATIONS[words[0]](*operands) & 0xFFFFFFFF
    assert not set(re.findall(r"\$\d", assembly)) - set(registers)
    return registers["$0"]


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_codes_of_four_quarters_are_joined(bits, head_dim):
    """Two channels of a quarter at a time, each shifted as the kernel does it."""
    codes = torch.randint(2**bits, (1, head_dim))
    words, quarter = bitpack.pack(codes, bits)[0].tolist(), head_dim // 4
    expected = _join(list(codes[0].chunk(4)), (bits,) * 4).tolist()

    def low(x):
        return (words[x % (quarter // 2)] >> x // (quarter // 2) * 2) & 0xFFFF

    def high(x):
        return (words[head_dim // 8 + x % (quarter // 4)] >> x // (quarter // 4)) & 0xFFFF

    for x in range(0, quarter, 2):
        inputs = [one(x) | one(x + 1) << 16 for one in ((low,) if bits == 2 else (low, high))]
        assembly = (JOIN_TWO_BITS if bits == 2 else JOIN_THREE_BITS).value
        assert halves(emulated(assembly, *inputs)).tolist() == expected[x : x + 2]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_minus_half_of_their_number(bits):
    for depths in PATTERNS[bits]:
        numbers = [torch.randint(2**depth, (2,)) for depth in depths]
        low, high = _join(numbers, depths).tolist()
        for q, depth in enumerate(depths):
            twice = [2**16 + 1] * 4  # the same number in both halves
            begin, mask, magic = (n * m for n, m in zip((sum(depths[:q]), 2**depth - 1, 0x6400), twice))
            middle = pair(np.full(2, 1024 + 2 ** (depth - 1), np.float16))
            found = halves(emulated(CENTRE_CODES.value, low | high << 16, begin, mask, magic, middle)).view(np.float16)
            assert found.tolist() == (numbers[q] - 2 ** (depth - 1)).tolist()


def test_tiles_and_patterns_are_those_of_the_format():
    assert quarters(128, 4) == (32, 32, 1, 4, 4) and quarters(16, 2) == (4, 16, 1, 4, 2) and quarters(256, 8) == (64, 32, 2, 4, 8)
    assert spending(3).DEPTHS[4:8] == PATTERNS[3][1]
