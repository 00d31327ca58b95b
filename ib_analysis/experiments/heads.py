"""I(full KV; compressed KV) of an allocation, head by head: what is stored, what codes hold, what the model uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from ib_kernels import RAW_BITS, SideName
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.cache.plan import EVICTED, RAW, Head, plan_of
from ib_analysis.codes.gathered import SIDES, Gathered, TierSide, all_sides, gather, sides_of
from ib_analysis.codes.rates import CodeRates, metadata_bits
from ib_analysis.estimators import ESTIMATORS
from ib_analysis.estimators.dithered_channel import SPACE_FILLING_BITS
from ib_analysis.estimators.estimate import ABOVE_ENTROPY, GAUSSIAN_MISFIT, TOO_FEW, too_few
from ib_analysis.replay.examples import Prompts, make_examples
from ib_analysis.replay.measurement import bootstrap_interval
from ib_analysis.replay.replays import Replays
from ib_analysis.search.allocation import Allocation
from ib_analysis.search.optimize import check_name

RAW_FLOATS = "raw floats"  # codes are 16-bit floats: their entropy counts the whole mantissa
NOTHING_KEPT = "nothing kept"
ALL_RECENT = "all recent"  # no prompt has a token that could be compressed
SAMPLES = 2000  # tokens of a head that an estimator is given
RATES = ("stored_bits", "code_entropy_bits", "code_rate_bits", "tight_code_rate_bits")
INFORMATION = ("dithered_bits", "dithered_upper_bits", "gaussian_bits", "gaussian_low_bits", "gaussian_high_bits")
USABLE = ("usable_bits", "usable_low_bits", "usable_high_bits", "full_usable_bits")


def information(
    model: PreTrainedModel,
    allocation: Allocation,
    prompts: Prompts,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    question_aware: bool = True,
    seed: int = 1,
    estimators: Sequence[str] = (),
) -> pd.DataFrame:
    """A row for the keys, the values and both of every head that can be compressed; the last row is the whole cache.

    Bits per context token:
        stored_bits: every byte that is held, sinks and windows included; exact.
        code_entropy_bits: entropies of the integer codes of each channel, Miller-Madow corrected, summed over kept tokens.
            Of a token at 16 bits it is the entropy of sign and exponent and the whole mantissa (flag "raw floats").
        code_rate_bits: the memoryless code rate: code_entropy_bits, scales and minima as they are stored, and the mask of
            kept tokens (with the keys). An upper bound on what the codes hold; sinks and windows are given and not counted.
        tight_code_rate_bits: less by the Gaussian total correlation of the codes.
        dithered_bits, dithered_upper_bits: I(X; X + N), N independent noise with the power of each channel's error: the
            value for Gaussian X, and an upper bound for any X if N is uniform.
        gaussian_bits: min(I_G, H(T)) with the 95% interval of I_G; flag "above H(T)" where they crossed. Where tiers, parts
            or heads are added, so are the ends gaussian_low_bits and gaussian_high_bits: no 95% interval, but at least as wide.
        NAME_bits, for each of `estimators`, names in ESTIMATORS: what it says of a sample of the head's tokens and their decoded
            copies, no more than the codes hold; NaN where it declines.
    Bits per predicted token:
        usable_bits: what the compressed head still says about the next token, all other heads as they are: KL of evicting
            it less KL of compressing it, with a 95% interval over prompts. Of the cache: all heads at once.
        full_usable_bits: the same of the head at full precision.
    `kept_tokens` are the compressible tokens kept of an average prompt; where there are none the flag is "nothing kept", or
    "all recent" if no prompt is long enough for any to be compressed. Sums over heads count what heads share repeatedly.

    Arguments as of `Allocation.validate`. Moments are streamed: memory grows neither with tokens nor with prompts.
    Layers with a sliding window are never compressed and have no rows.
    """
    allocation.check_model(model)
    for name in estimators:
        check_name("estimator", name, ESTIMATORS)
    examples = make_examples(model, tokenizer, prompts, question_aware=question_aware, seed=seed)
    replays = Replays(model, allocation.spec, examples)
    sides = all_sides([allocation.plans], allocation.spec.shape)
    samples = -(-SAMPLES // len(examples)) if estimators else 0
    gathered = gather(replays, sides, show="gathering codes", samples=samples)
    rates = CodeRates(allocation.spec, replays.lengths, sides, gathered)
    estimates = {side: _Estimates(sides[side], found, estimators) for side, found in gathered.items()}
    measures = (*INFORMATION, *(f"{name}_bits" for name in estimators))
    rows = [row for head in allocation.spec.shape.heads for row in _head_rows(allocation, head, rates, estimates, measures)]
    table = pd.DataFrame(rows)
    both = table.side == "both"
    total = {name: table.loc[both, name].sum(skipna=False) for name in ("kept_tokens", *RATES, *measures)}
    flags = sorted({flag for found in table["flags"] for flag in found.split(", ") if flag})
    table = pd.concat([table, pd.DataFrame([{"side": "cache", **total, "flags": ", ".join(flags)}])], ignore_index=True)
    usable = _usable(allocation, replays)
    table.loc[table.side.isin(["both", "cache"]), list(USABLE)] = usable
    table[["layer", "head"]] = table[["layer", "head"]].astype("Int64")
    return table[["layer", "head", "side", "kept_tokens", *RATES, *measures, *USABLE, "flags"]]


class _Estimates:
    """Information of one kept token of each head [U], in bits."""

    def __init__(self, heads: Sequence[Head], found: Gathered, estimators: Sequence[str]) -> None:
        self.heads, self.tokens = list(heads), found.tokens
        self.dim = found.counts.shape[1]
        self.entropy = found.code_entropy_bits().tolist()
        self.gaussian, self.width = (bits.tolist() for bits in found.gaussian_bits())
        self.dithered = found.dithered_bits().tolist()
        self.estimated = [found.estimated_bits(ESTIMATORS[name]).tolist() for name in estimators]
        self.misfit = found.misfit().tolist()
        self.few = too_few(found.tokens, found.documents, 2 * self.dim)
        self.raw = found.bits == RAW_BITS

    def of(self, head: Head, metadata: float) -> tuple[NDArray[np.float64], set[str]]:
        """INFORMATION, and what estimators say, of one token of a head whose metadata takes so many bits a token; and flags."""
        u = self.heads.index(head)
        limit = self.entropy[u] + metadata
        flags = {
            TOO_FEW: self.few,
            GAUSSIAN_MISFIT: self.misfit[u],
            ABOVE_ENTROPY: self.gaussian[u] > limit,
            RAW_FLOATS: self.raw,
        }
        low, high = self.gaussian[u] - self.width[u], self.gaussian[u] + self.width[u]
        upper = self.dithered[u] + self.dim * SPACE_FILLING_BITS
        limited = np.minimum([self.gaussian[u], low, high, *(bits[u] for bits in self.estimated)], limit)
        bits = np.array([self.dithered[u], upper, *limited])
        return bits, {name for name, raised in flags.items() if raised}


def _head_rows(
    allocation: Allocation, head: Head, rates: CodeRates, estimates: Mapping[TierSide, _Estimates], measures: Sequence[str]
) -> list[dict[str, Any]]:
    """Keys, values, both."""
    rows = [_side_row(allocation, head, side, rates, estimates, measures) for side in SIDES]
    keys, values = rows
    both = {name: keys[name] + values[name] for name in (*RATES, *measures)}
    flags = ", ".join(sorted({flag for row in rows for flag in row["flags"].split(", ") if flag}))
    return [*rows, {**keys, **both, "side": "both", "flags": flags}]


def _side_row(
    allocation: Allocation,
    head: Head,
    side: SideName,
    rates: CodeRates,
    estimates: Mapping[TierSide, _Estimates],
    measures: Sequence[str],
) -> dict[str, Any]:
    head_plan, dim = plan_of(allocation.plans, head), allocation.spec.shape.layers[head[0]].head_dim
    plan = head_plan or RAW
    total, kept = np.zeros(len(measures)), 0
    flags: set[str] = set()
    for t, (count, sides) in enumerate(zip(plan.counts(rates.tokens), sides_of(plan))):
        tokens = int(count.sum())
        if tokens:
            bits, raised = estimates[sides[side]].of(head, metadata_bits(plan, t, side, rates.tokens, dim) / tokens)
            total, flags, kept = total + tokens * bits, flags | raised, kept + tokens
    rate = rates.of(head_plan, head, side)
    return {
        "layer": head[0],
        "head": head[1],
        "side": side,
        "kept_tokens": kept / len(rates.lengths),
        **dict(zip(RATES, (rate.stored_bits, rate.entropy_bits, rate.code_bits, rate.tight_bits))),
        **dict(zip(measures, total / rates.lengths.sum())),
        "flags": ", ".join(sorted(flags)) if kept else NOTHING_KEPT if rates.tokens.any() else ALL_RECENT,
    }


def _usable(allocation: Allocation, replays: Replays) -> list[list[float]]:
    """USABLE of each head, then of the whole cache, in bits per predicted token."""
    spec, plans = allocation.spec, allocation.plans
    tried = [spec.single_head(head, plan) for head in spec.shape.heads for plan in (EVICTED, plan_of(plans, head))]
    kl_bits, _ = replays.measure([*tried, spec.null_plans, plans], show="measuring heads")
    rows = []
    for evicted, compressed in kl_bits.T.reshape(-1, 2, len(kl_bits)):
        retained = evicted - compressed
        rows.append([float(retained.mean()), *bootstrap_interval(retained), float(evicted.mean())])
    return rows
