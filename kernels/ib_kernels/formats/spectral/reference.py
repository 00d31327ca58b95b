"""The spectral format in plain torch: channels that matter more get more bits.

It is made for keys in a basis whose channels are sorted by what they matter to the queries, and alike within each quarter (see
`ib_kernels.bases`). A run spends its bits on the quarters as reverse water-filling does (Cover and Thomas 2006, section 10.3.3),
as near as one of PATTERNS comes to that for the variances of its first tokens. A quarter has a step of its own, because which
quarters are large differs from token to token.
"""

from __future__ import annotations

from functools import cache

import torch
from ib_kernels import ragged
from ib_kernels.formats.format import FP16_MAX, MetadataRows, Side
from ib_kernels.formats.rotated.reference import RotatedKeys
from torch import Tensor

# Bits of the channels of each quarter, four times the precision in all.
PATTERNS = {
    2: ((2, 2, 2, 2), (3, 2, 2, 1), (4, 2, 1, 1), (5, 1, 1, 1)),
    3: ((3, 3, 3, 3), (4, 3, 3, 2), (5, 3, 2, 2), (5, 4, 2, 1)),
    4: ((4, 4, 4, 4), (5, 4, 4, 3), (6, 4, 3, 3), (6, 5, 3, 2)),
    8: ((8, 8, 8, 8), (9, 8, 8, 7), (10, 8, 7, 7), (10, 9, 7, 6)),
}

# Of the uniform quantizer with 2**bits levels that has the least error on a Gaussian (Max 1960), in its variance: step and error.
GAUSSIAN_STEP = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308, 9: 0.0164, 10: 0.0088}
GAUSSIAN_ERROR = {1: 0.363, 2: 0.119, 3: 0.0374, 4: 0.0115, 5: 0.00349, 6: 1.04e-3, 7: 3.0e-4, 8: 8.8e-5, 9: 2.5e-5, 10: 7.1e-6}

# A step is made for a deviation: a power of two, whose exponent is so many parts below a top. The tops of the last three quarters
# are relative to the first's exponent. Tops and parts are in sixths. All four numbers of parts are one word of 16 bits.
TOPS, PARTS, PART_BITS = (78, 3, 0, -3), (2, 2, 3, 3), (6, 4, 3, 3)
NOT_A_NUMBER = 63  # in place of the parts of the first quarter
LOWEST = -80  # sixths, below all that there are
TRIED = (-2, -1, 0, 1, 2)  # parts by which a step may differ from the one for a Gaussian
TINY = 2.0**-100  # so that the logarithm of a deviation is finite
BLOCK_TOKENS, BLOCK_TOKENS_GPU = 2048, 2**17  # that are quantized together: what a CPU's cache holds, and what a GPU is busy with


class SpectralKeys:
    """Steps int16 [N, 1]: the deviations that the four steps of a token are made for, the first quarter's in the lowest bits.
    Fitted to the first tokens of a run: deviations [P, 4], root mean squares of quarters; centre [P, D], as for rotated keys.
    """

    def metadata(self, head_dim: int) -> dict[str, MetadataRows]:
        return {
            "steps": MetadataRows(1, dtype=torch.int16),
            "deviations": MetadataRows(4, tokens_per_row=0),
            "centre": MetadataRows(head_dim, tokens_per_row=0),
        }

    def fit(self, x: Tensor, lengths: Tensor) -> Side:
        centre = RotatedKeys().fit(x, lengths)
        squares = torch.stack([_deviation(quarter).square() for quarter in _quarters(_centred(x, lengths, centre))], 1)  # [N, 4]
        padded, _ = ragged.pad(squares, lengths)
        deviations = (padded.sum(1, dtype=torch.float64) / lengths.clamp(min=1)[:, None]).sqrt()
        return {"deviations": deviations.clamp(2.0**-14, FP16_MAX).to(torch.float16), **centre}

    def quantize(self, x: Tensor, lengths: Tensor, bits: int, fitted: Side) -> tuple[Tensor, Side]:
        centred, pattern = _centred(x, lengths, fitted), _patterns(fitted, bits)[ragged.run_of_row(lengths, x.shape[0])]
        codes, steps = x.new_zeros(x.shape, dtype=torch.uint8), x.new_zeros(x.shape[0], 1, dtype=torch.int16)
        for number, depths in enumerate(PATTERNS[bits]):
            for rows in _blocks(pattern == number):
                codes[rows], steps[rows, 0] = _encode(centred[rows], depths, bits)
        return codes, {"steps": steps, **fitted}

    def dequantize(self, codes: Tensor, metadata: Side, lengths: Tensor, bits: int) -> Tensor:
        run = ragged.run_of_row(lengths, codes.shape[0])
        x = metadata["centre"].float()[run]
        pattern = _patterns(metadata, bits)[run]
        for number, depths in enumerate(PATTERNS[bits]):
            for rows in _blocks(pattern == number):
                x[rows] += _decode(codes[rows], metadata["steps"][rows, 0], depths, bits)
        return x


def _patterns(fitted: Side, bits: int) -> Tensor:
    """Which of PATTERNS[bits] has the least error on each run, if its quarters are Gaussian: int64 [P]."""
    variances = fitted["deviations"].double().square()  # [P, 4]
    # fp32 times the square of fp16 is exact in fp64, and the order of the sums is fixed: kernels choose the same pattern.
    table = [[GAUSSIAN_ERROR[depth] for depth in depths] for depths in PATTERNS[bits]]
    errors = torch.tensor(table, dtype=torch.float32, device=variances.device)
    lost = variances.new_zeros(variances.shape[0], len(errors))
    for quarter in range(4):
        lost += variances[:, quarter, None] * errors[:, quarter].double()
    return lost.argmin(1)


def _blocks(chosen: Tensor) -> tuple[Tensor, ...]:
    """The rows that are chosen of bool [N], so many at a time as are handled together."""
    return chosen.nonzero()[:, 0].split(BLOCK_TOKENS if chosen.device.type == "cpu" else BLOCK_TOKENS_GPU)


def _centred(x: Tensor, lengths: Tensor, fitted: Side) -> Tensor:
    return x.clamp(-FP16_MAX, FP16_MAX) - fitted["centre"].float()[ragged.run_of_row(lengths, x.shape[0])]


def _quarters(x: Tensor) -> tuple[Tensor, ...]:
    """The channels of each quarter: four times [N, D / 4]."""
    if x.shape[1] % 4:
        raise ValueError(f"the spectral format needs a head_dim that is a multiple of 4, not {x.shape[1]}")
    return x.chunk(4, 1)


def _encode(x: Tensor, depths: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, D] below 2**bits, and steps int16 [N], of centred rows with the same pattern."""
    quarters = _quarters(x)
    deviations = [_deviation(quarter) for quarter in quarters]
    # The first is high enough for all quarters: one that is larger than it may be would be cut off.
    needed = torch.stack([d * 2.0 ** (-top / 6) for d, top in zip(deviations[1:], TOPS[1:])]).amax(0)
    lowest = _parts_below(torch.full_like(needed, TOPS[0]), needed, PARTS[0]).floor().long().clamp(0, NOT_A_NUMBER - 1)
    parts: list[Tensor] = []
    for q, (quarter, depth, deviation) in enumerate(zip(quarters, depths, deviations)):
        last = lowest if q == 0 else torch.full_like(lowest, 2 ** PART_BITS[q] - 1)
        parts.append(_best_part(quarter, depth, deviation, _top(parts, q, lowest), PARTS[q], last))
    codes = [_codes(quarter, step, depth) for quarter, step, depth in zip(quarters, _steps(parts, depths), depths)]
    parts[0] = parts[0].masked_fill(x.isnan().any(1), NOT_A_NUMBER)
    joined, steps = _join(codes, depths), _join(parts, PART_BITS)
    even = _split(joined, (bits,) * 4)  # as wide as codes of one precision for all channels
    return torch.cat(even, 1).to(torch.uint8), (steps - (steps >> 15 << 16)).to(torch.int16)


def _decode(codes: Tensor, steps: Tensor, depths: tuple[int, ...], bits: int) -> Tensor:
    """Centred rows fp32 [N, D], from what `_encode` gives."""
    parts = _split(steps.long() & 0xFFFF, PART_BITS)
    found = _split(_join(list(codes.long().chunk(4, 1)), (bits,) * 4), depths)
    quarters = [(code - (2**depth - 1) / 2) * step[:, None] for code, step, depth in zip(found, _steps(parts, depths), depths)]
    return torch.cat(quarters, 1).masked_fill((parts[0] == NOT_A_NUMBER)[:, None], torch.nan)


def _steps(parts: list[Tensor], depths: tuple[int, ...]) -> list[Tensor]:
    """The steps fp32 [N] of each quarter."""
    tops = [_top(parts, q, parts[0]) for q in range(4)]
    return [_step(top - part * size, depth) for depth, top, part, size in zip(depths, tops, parts, PARTS)]


def _step(sixths: Tensor, depth: int) -> Tensor:
    """fp32 [N]: for a deviation of 2**(sixths / 6)."""
    return GAUSSIAN_STEP[depth] * _powers(sixths.device)[sixths - LOWEST]


@cache
def _powers(device: torch.device) -> Tensor:
    """fp32: 2**(sixths / 6) from LOWEST on. A table, because exp2 differs from machine to machine."""
    powers = [2.0 ** (sixths / 6) for sixths in range(LOWEST, TOPS[0] + TOPS[1] + 1)]
    return torch.tensor(powers, dtype=torch.float32, device=device)


def _top(parts: list[Tensor], q: int, like: Tensor) -> Tensor:
    """Sixths int64 [N] of the largest deviation that a step of quarter q can be made for."""
    return torch.full_like(like, TOPS[0]) if q == 0 else TOPS[0] - parts[0] * PARTS[0] + TOPS[q]


def _parts_below(tops: Tensor, deviation: Tensor, size: int) -> Tensor:
    """fp32 [N]: how many parts of `size` sixths a deviation is below its top; 0 for NaN."""
    return ((tops - 6 * deviation.clamp(min=TINY).log2()) / size).nan_to_num(0.0)


def _deviation(quarter: Tensor) -> Tensor:
    """Root mean square of each row: fp32 [N]. The sum is in float64, so that its order does not show."""
    return quarter.double().square().mean(1).sqrt().float()


def _best_part(quarter: Tensor, depth: int, deviation: Tensor, tops: Tensor, size: int, last: Tensor) -> Tensor:
    """int64 [N]: of the step for a Gaussian of this deviation and a few beside it the one with the least squared error.

    In parts of `size` sixths down from the tops, 0 to `last`.
    """
    gaussian = _parts_below(tops, deviation, size).round().long()
    best = gaussian.clamp(min=0).minimum(last)
    least = torch.full_like(deviation, torch.inf, dtype=torch.float64)
    for more in TRIED:
        part = (gaussian + more).clamp(min=0).minimum(last)
        step = _step(tops - part * size, depth)
        error = _squared_error(quarter, step, depth)
        less = error < least  # not if NaN
        best, least = torch.where(less, part, best), torch.where(less, error, least)
    return best


def _squared_error(quarter: Tensor, step: Tensor, depth: int) -> Tensor:
    """fp64 [N]: what these steps [N] lose of rows [N, D / 4]."""
    steps = quarter.abs() / step[:, None]
    middle = steps.floor().clamp(max=2 ** (depth - 1) - 1) + 0.5
    return (steps - middle).double().square().sum(1) * step.double().square()


def _codes(quarter: Tensor, step: Tensor, depth: int) -> Tensor:
    """int64 [N, D / 4] in [0, 2**depth); NaN as the lowest."""
    levels = (quarter / step[:, None]).floor() + 2 ** (depth - 1)
    return levels.nan_to_num(0.0).clamp(0, 2**depth - 1).long()


def _join(numbers: list[Tensor], widths: tuple[int, ...]) -> Tensor:
    """One int64 for each of several numbers of so many bits, the first in the lowest bits."""
    joined, begin = torch.zeros_like(numbers[0], dtype=torch.int64), 0
    for number, width in zip(numbers, widths):
        joined |= number << begin
        begin += width
    return joined


def _split(joined: Tensor, widths: tuple[int, ...]) -> list[Tensor]:
    """The numbers that were joined."""
    begins = [sum(widths[:i]) for i in range(len(widths))]
    return [(joined >> begin) & (2**width - 1) for begin, width in zip(begins, widths)]
