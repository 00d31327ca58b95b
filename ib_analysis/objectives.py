"""What every option of every head keeps by each measure of information, from one pass over prompts.

These are the tables that drive `optimal_allocation` in place of measured KL. All are in bits per context token and grow with
what is kept; only measured KL knows what the model does with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ib_analysis.calibration import Replays
from ib_analysis.information import dithered_bits, gaussian_bits
from ib_analysis.pieces import PARTS, Gathered, gather, pieces_of
from ib_analysis.plan import HeadPlan
from ib_analysis.rates import CodeRates, Head, context_lengths, side_bits

USABLE = "usable"  # measured KL: `Profile`
OBJECTIVES = ("code_rate", "tight_code_rate", "dithered", "gaussian")
HELD_BYTES = 2**30  # of moments; heads are taken in turns beyond


def objective_tables(replays: Replays, options: Sequence[HeadPlan], show: str = "") -> dict[str, NDArray[np.float64]]:
    """Bits per context token that each option keeps of each head: [heads, options] for every name in OBJECTIVES.

    "code_rate" and "tight_code_rate" are those of `rates.Rate`, mask and metadata included; "dithered" the Gaussian value of
    the dithered channel and "gaussian" I_G, neither above H(T). See `information`.
    A measure that too few tokens leave undefined is 0.
    """
    shape = next(iter(replays)).shape
    rows = [_rows(replays, heads, options, show) for heads in _turns(shape.heads, shape.layers[0].head_dim, options)]
    return {name: np.concatenate([found[name] for found in rows]) for name in OBJECTIVES}


def _turns(heads: list[Head], dim: int, options: Sequence[HeadPlan]) -> list[list[Head]]:
    """Heads, as many at a time as their moments fit in memory."""
    pieces = {piece for option in options for tier in pieces_of(option) for piece in tier.values()}
    head_bytes = len(pieces) * 8 * (5 * dim**2 + 256 * dim)
    most = max(1, HELD_BYTES // max(1, head_bytes))
    return [heads[start : start + most] for start in range(0, len(heads), most)]


def _rows(replays: Replays, heads: list[Head], options: Sequence[HeadPlan], show: str) -> dict[str, NDArray[np.float64]]:
    first = next(iter(replays))
    pieces = {piece: heads for option in options for tier in pieces_of(option) for piece in tier.values()}
    gathered = gather(replays, pieces, groups=1, show=show)
    rates = CodeRates(first.shape, first.pinned, context_lengths(replays), pieces, gathered)
    token_bits = {piece: _token_bits(found) for piece, found in gathered.items()}
    dim, context_tokens = first.shape.layers[heads[0][0]].head_dim, rates.lengths.sum()
    tables = {name: np.zeros((len(heads), len(options))) for name in OBJECTIVES}
    for (o, option), part in product(enumerate(options), PARTS):
        one = rates.of(option, heads[0], part)
        for name in ("code_rate", "tight_code_rate"):
            tables[name][:, o] += one.code_bits - one.entropy_bits  # the mask and metadata, alike for all heads
        for t, (count, tier) in enumerate(zip(option.counts(rates.tokens), pieces_of(option))):
            if tokens := int(count.sum()):
                bits = token_bits[tier[part]]
                limit = bits["code_rate"] + side_bits(option, t, part, rates.tokens, dim) / tokens
                for name in OBJECTIVES:
                    tables[name][:, o] += tokens / context_tokens * np.minimum(bits[name], limit)
    return tables


def _token_bits(found: Gathered) -> dict[str, NDArray[np.float64]]:
    """Each measure [U] of one kept token."""
    assert found.moments is not None
    entropy = found.code_entropy_bits()
    measures = {
        "code_rate": entropy,
        "tight_code_rate": entropy - found.total_correlation_bits().nan_to_num(0).minimum(entropy),
        "dithered": dithered_bits(found.moments).nan_to_num(0),
        "gaussian": found.moments.jackknife(gaussian_bits)[0].nan_to_num(0),
    }
    return {name: bits.cpu().numpy() for name, bits in measures.items()}
