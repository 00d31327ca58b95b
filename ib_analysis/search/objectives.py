"""What every option of every head keeps by each measure of information, from one pass over prompts.

These are the tables that drive `optimal_allocation` in place of measured KL. All are in bits per context token and grow with
what is kept; only measured KL knows what the model does with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from ib_kernels import RAW_BITS
from numpy.typing import NDArray
from torch import Tensor

from ib_analysis.cache.plan import Head, HeadPlan
from ib_analysis.codes.gathered import SIDES, Gathered, TierSide, gather, sides_of
from ib_analysis.codes.rates import CodeRates, metadata_bits
from ib_analysis.errors import CalibrationError
from ib_analysis.estimators import ESTIMATORS
from ib_analysis.replay.replays import Replays

USABLE = "usable"  # measured KL: `Profile`
OBJECTIVES = ("code_rate", "tight_code_rate", "dithered", "gaussian")  # streamed; any other estimator needs samples
HELD_BYTES = 2**30  # of moments; heads are taken in turns beyond
SAMPLES = 16  # tokens of a prompt that an estimator is given


def objective_names() -> tuple[str, ...]:
    """Every objective: the usable information, the streamed measures, and the registered estimators."""
    return (USABLE, *OBJECTIVES, *(name for name in ESTIMATORS if name not in OBJECTIVES))


def objective_tables(
    replays: Replays, options: Sequence[HeadPlan], names: Sequence[str] = OBJECTIVES, show: str = ""
) -> dict[str, NDArray[np.float64]]:
    """Bits per context token that each option keeps of each head: [heads, options] for each of the names.

    "code_rate" and "tight_code_rate" are those of `rates.Rate`, mask and metadata included; "dithered" the Gaussian value of
    the dithered channel and "gaussian" I_G; other names are estimators, which see a sample of a head's tokens. But for the
    first none is above H(T). See `information`. A measure that too few tokens leave undefined is 0. Of tokens at 16 bits an
    estimator that declines, because it is given copies, leaves the code rate.
    Raises CalibrationError if an estimator declines for all precisions of a head.
    """
    shape = replays.spec.shape
    turns = _turns(shape.heads, shape.layers[shape.compressible[0]].head_dim, options)
    rows = [_rows(replays, heads, options, names, show) for heads in turns]
    return {name: np.concatenate([found[name] for found in rows]) for name in names}


def _turns(heads: list[Head], dim: int, options: Sequence[HeadPlan]) -> list[list[Head]]:
    """Heads, as many at a time as their moments fit in memory."""
    sides = {side for option in options for tier in sides_of(option) for side in tier.values()}
    head_bytes = len(sides) * 8 * (5 * dim**2 + 256 * dim)
    count = max(1, HELD_BYTES // max(1, head_bytes))
    return [heads[start : start + count] for start in range(0, len(heads), count)]


def _rows(
    replays: Replays, heads: list[Head], options: Sequence[HeadPlan], names: Sequence[str], show: str
) -> dict[str, NDArray[np.float64]]:
    sides = {side: heads for option in options for tier in sides_of(option) for side in tier.values()}
    samples = 0 if set(names) <= set(OBJECTIVES) else SAMPLES
    gathered = gather(replays, sides, groups=1, show=show, samples=samples)
    rates = CodeRates(replays.spec, replays.lengths, sides, gathered)
    token_bits = {side: _token_bits(side, found, names) for side, found in gathered.items()}
    _check_estimates(token_bits, names)
    dim, context_tokens = replays.spec.shape.layers[heads[0][0]].head_dim, rates.lengths.sum()
    tables = {name: np.zeros((len(heads), len(options))) for name in names}
    for (o, option), side in product(enumerate(options), SIDES):
        one = rates.of(option, heads[0], side)
        for name in {"code_rate", "tight_code_rate"} & tables.keys():
            tables[name][:, o] += one.code_bits - one.entropy_bits  # the mask and metadata, alike for all heads
        for t, (count, tier) in enumerate(zip(option.counts(rates.tokens), sides_of(option))):
            if tokens := int(count.sum()):
                bits = token_bits[tier[side]]
                limit = bits["code_rate"] + metadata_bits(option, t, side, rates.tokens, dim) / tokens
                for name in names:
                    tables[name][:, o] += tokens / context_tokens * np.minimum(bits[name], limit)
    return tables


def _check_estimates(token_bits: Mapping[TierSide, Mapping[str, NDArray[np.float64]]], names: Sequence[str]) -> None:
    """Where an estimator says nothing, all precisions would seem alike, and everything be evicted."""
    packed = [bits for side, bits in token_bits.items() if side.bits < RAW_BITS]
    for name in {*names} - {*OBJECTIVES}:
        if packed and not np.any([bits[name] for bits in packed], axis=0).all():
            raise CalibrationError(f"the estimator {name} declines, so it is no objective: pass more prompts, or longer ones")


def _token_bits(side: TierSide, found: Gathered, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Each measure [U] of one kept token, and always the code rate, which limits the others."""
    entropy = found.code_entropy_bits()
    measures = {
        "tight_code_rate": lambda: entropy - found.total_correlation_bits().nan_to_num(0).minimum(entropy),
        "dithered": lambda: found.dithered_bits().nan_to_num(0),
        "gaussian": lambda: found.gaussian_bits()[0].nan_to_num(0),
    }
    bits = {"code_rate": entropy}
    for name in {*names} - {"code_rate"}:
        bits[name] = measures[name]() if name in measures else _estimated_bits(side, found, name, entropy)
    return {name: values.cpu().numpy() for name, values in bits.items()}


def _estimated_bits(side: TierSide, found: Gathered, name: str, entropy: Tensor) -> Tensor:
    """What an estimator says [U]. It declines copies, whose information has no limit but the entropy of their codes [U]."""
    bits = found.estimated_bits(ESTIMATORS[name])
    return bits.where(~bits.isnan(), entropy if side.bits == RAW_BITS else 0.0)
