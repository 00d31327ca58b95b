"""Which format? What caches lose that keep all tokens, and store keys or values in each format at each precision."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import get_args

import numpy as np
import pandas as pd
from ib_kernels import RAW_BITS, SideName, get_format, side_nbytes
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.cache.plan import BITS, HeadPlan, Plans, Recent, Tier
from ib_analysis.cache.spec import CacheSpec
from ib_analysis.codes.gathered import TierSide, gather
from ib_analysis.model.shape import cache_shape
from ib_analysis.replay.examples import Prompts, check_lengths, make_examples, median_length
from ib_analysis.replay.measurement import bootstrap_interval
from ib_analysis.replay.replays import Replays
from ib_analysis.scorers import SCORERS
from ib_analysis.search.calibration import usable_formats
from ib_analysis.search.fit_bases import at_lengths, fit_bases, summed
from ib_analysis.search.fit_scorer import read_tokens

RECENT = Recent(sinks=1, window=1, flush=1)  # nearly all tokens are stored
SIDES = get_args(SideName)


def format_losses(
    model: PreTrainedModel,
    calibrating: Prompts,
    fresh: Prompts,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    question_aware: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """One row for each side, format and precision, measured on the fresh prompts. The model is left as it was.

    Columns: side, "keys" or "values", the other one at 16 bits; format, bits; stored_bits of a number, metadata included, at the
    median length of the contexts; entropy_bits: that with the fields that codes are stored in at their entropy, which an entropy
    coder comes to; kl_bits = E KL(full || compressed) in bits per predicted token, with its 95% interval low_bits, high_bits.

    Args:
        calibrating: prompts that the bases of keys are fitted to, used for nothing else.
        fresh: prompts that are measured.

    The other arguments are those of `optimal_allocation`. Raises CalibrationError.
    """
    spec = CacheSpec(cache_shape(model.config), RECENT, SCORERS["streaming_llm"])
    examples = make_examples(model, tokenizer, fresh, question_aware=question_aware, seed=seed + 1)
    check_lengths(examples, RECENT)
    seen = make_examples(model, tokenizer, calibrating, question_aware=question_aware, seed=seed)
    replays = Replays(model, spec, seen)
    if any(get_format(name).turns_keys for name in usable_formats(replays)):
        moments: list[Tensor] = []
        for _, more in read_tokens(replays, seed):
            moments = summed(moments, more)
        spec = replace(spec, bases=fit_bases(spec, at_lengths(model, moments, median_length(seen))))
    sides = [TierSide(side, fmt, bits, (1.0,)) for side, fmt, bits in product(SIDES, spec.formats, BITS)]
    replays = Replays(model, spec, examples)
    kl_bits, _ = replays.measure([_plans(spec, side) for side in sides], "held-out prompts")  # [prompts, sides]
    gathered = gather(replays, dict.fromkeys(sides, spec.shape.heads), groups=0, show="entropies")
    tokens = RECENT.compressible(median_length(examples))
    numbers = sum(spec.shape.layers[layer].head_dim for layer, _ in spec.shape.heads)  # of a token, on one side
    rows = []
    for side, losses in zip(sides, kl_bits.T):
        stored_bits = 8 * _nbytes(spec, side, tokens) / (tokens * numbers)
        coded_bits = float(gathered[side].code_entropy_bits().sum()) / numbers
        low, high = bootstrap_interval(losses)
        rows.append(
            {
                "side": side.side,
                "format": side.format,
                "bits": side.bits,
                "stored_bits": stored_bits,
                "entropy_bits": stored_bits - side.bits + coded_bits,
                "kl_bits": float(losses.mean()),
                "low_bits": low,
                "high_bits": high,
            }
        )
    return pd.DataFrame(rows)


def _plans(spec: CacheSpec, side: TierSide) -> Plans:
    bits = (side.bits, RAW_BITS) if side.side == "keys" else (RAW_BITS, side.bits)
    return spec.uniform(HeadPlan(side.format, (Tier(1.0, *bits),)))


def _nbytes(spec: CacheSpec, side: TierSide, tokens: int) -> int:
    """Of one side of all heads."""
    quantizer = getattr(get_format(side.format), side.side)
    dims = [spec.shape.layers[layer].head_dim for layer, _ in spec.shape.heads]
    return sum(int(side_nbytes(quantizer, np.array([tokens]), dim, side.bits)[0]) for dim in dims)


def formats_text(table: pd.DataFrame) -> str:
    """`format_losses` as Markdown: a line for each format and precision."""
    lines = ["| side | format | bits | stored | at entropy | KL |", "|---|---|---:|---:|---:|---:|"]
    lines += [
        f"| {row.side} | {row.format} | {row.bits} | {row.stored_bits:.2f} | {row.entropy_bits:.2f} | "
        f"{row.kl_bits:.5f} [{row.low_bits:.5f}, {row.high_bits:.5f}] |"
        for row in table.itertuples()
    ]
    return "\n".join(lines)
