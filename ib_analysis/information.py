"""I(full KV; compressed KV) of an allocation, head by head: what is stored, what codes hold, what the model uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.allocation import Allocation
from ib_analysis.calibration import Replays, null_plans
from ib_analysis.episodes import make_episodes
from ib_analysis.estimators.dithered_channel import SPACE_FILLING_BITS, channel_bits
from ib_analysis.estimators.estimate import ABOVE_ENTROPY, GAUSSIAN_MISFIT, TOO_FEW, too_few
from ib_analysis.estimators.gaussian import information_or_nan_bits, regular
from ib_analysis.estimators.moments import Moments
from ib_analysis.formats import RAW_BITS
from ib_analysis.measurement import bootstrap_interval
from ib_analysis.pieces import PARTS, Gathered, Part, Piece, gather, pieces_of
from ib_analysis.plan import HeadPlan
from ib_analysis.rates import RAW, CodeRates, Head, all_pieces, context_lengths, plan_of, side_bits
from ib_analysis.replay import PlansToTry

RAW_FLOATS = "raw floats"  # codes are 16-bit floats: their entropy counts the whole mantissa
NOTHING_KEPT = "nothing kept"
ALL_PINNED = "all pinned"  # no prompt has a token that could be compressed
RATES = ("stored_bits", "code_entropy_bits", "code_rate_bits", "tight_code_rate_bits")
INFORMATION = ("dithered_bits", "dithered_upper_bits", "gaussian_bits", "gaussian_low_bits", "gaussian_high_bits")
USABLE = ("usable_bits", "usable_low_bits", "usable_high_bits", "full_usable_bits")


def information(
    model: PreTrainedModel,
    allocation: Allocation,
    prompts: Sequence[Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    question_aware: bool = True,
    seed: int = 1,
) -> pd.DataFrame:
    """A row for the keys, the values and both of every head that can be compressed; the last row is the whole cache.

    Bits per context token:
        stored_bits: every byte that is held, pinned tokens at 16 bits included; exact.
        code_entropy_bits: entropies of the integer codes of each channel, Miller-Madow corrected, summed over kept tokens.
            Of a token at 16 bits it is the entropy of sign and exponent and the whole mantissa (flag "raw floats").
        code_rate_bits: the memoryless code rate: code_entropy_bits, scales and minima as they are stored, and the mask of
            kept tokens (with the keys). An upper bound on what the codes hold; pinned tokens are given and not counted.
        tight_code_rate_bits: less by the Gaussian total correlation of the codes.
        dithered_bits, dithered_upper_bits: I(X; X + N), N independent noise with the power of each channel's error: the
            value for Gaussian X, and an upper bound for any X if N is uniform.
        gaussian_bits: min(I_G, H(T)) with the 95% interval of I_G; flag "above H(T)" where they crossed. Where tiers, parts
            or heads are added, so are the ends gaussian_low_bits and gaussian_high_bits: no 95% interval, but at least as wide.
    Bits per predicted token:
        usable_bits: what the compressed head still says about the next token, all other heads as they are: KL of evicting
            it less KL of compressing it, with a 95% interval over prompts. Of the cache: all heads at once.
        full_usable_bits: the same of the head at full precision.
    `kept_tokens` are the compressible tokens kept of an average prompt; where there are none the flag is "nothing kept", or
    "all pinned" if no prompt is long enough for any to be compressed. Sums over heads count what heads share repeatedly.

    Arguments as of `Allocation.validate`. Moments are streamed: memory grows neither with tokens nor with prompts.
    Layers with a sliding window are never compressed and have no rows.
    """
    allocation.check_model(model)
    episodes = make_episodes(model, tokenizer, prompts, question_aware=question_aware, seed=seed)
    replays = Replays(model, allocation.shape, allocation.pinned, allocation.scorer, episodes)
    pieces = all_pieces([allocation.plans], allocation.shape)
    gathered = gather(replays, pieces, show="gathering codes")
    rates = CodeRates(allocation.shape, allocation.pinned, context_lengths(replays), pieces, gathered)
    estimates = {piece: _Estimates(pieces[piece], found) for piece, found in gathered.items()}
    rows = [row for head in allocation.shape.heads for row in _head_rows(allocation, head, rates, estimates)]
    table = pd.DataFrame(rows)
    both = table.part == "both"
    total = {name: table.loc[both, name].sum(skipna=False) for name in ("kept_tokens", *RATES, *INFORMATION)}
    flags = sorted({flag for found in table["flags"] for flag in found.split(", ") if flag})
    table = pd.concat([table, pd.DataFrame([{"part": "cache", **total, "flags": ", ".join(flags)}])], ignore_index=True)
    usable = _usable(allocation, replays)
    table.loc[table.part.isin(["both", "cache"]), list(USABLE)] = usable
    table[["layer", "head"]] = table[["layer", "head"]].astype("Int64")
    return table[["layer", "head", "part", "kept_tokens", *RATES, *INFORMATION, *USABLE, "flags"]]


class _Estimates:
    """Information of one kept token of each head [U], in bits."""

    def __init__(self, heads: Sequence[Head], found: Gathered) -> None:
        assert found.moments is not None
        self.heads, self.tokens = list(heads), found.tokens
        self.dim = found.counts.shape[1]
        self.entropy = found.code_entropy_bits().tolist()
        self.gaussian, self.width = (bits.tolist() for bits in found.moments.jackknife(gaussian_bits))
        self.dithered = dithered_bits(found.moments).tolist()
        self.misfit = found.misfit().tolist()
        self.few = too_few(found.tokens, found.documents, 2 * self.dim)
        self.raw = found.bits == RAW_BITS

    def of(self, head: Head, side: float) -> tuple[NDArray[np.float64], set[str]]:
        """INFORMATION of one token of a head whose side information takes `side` bits a token, and flags."""
        u = self.heads.index(head)
        limit = self.entropy[u] + side
        flags = {
            TOO_FEW: self.few,
            GAUSSIAN_MISFIT: self.misfit[u],
            ABOVE_ENTROPY: self.gaussian[u] > limit,
            RAW_FLOATS: self.raw,
        }
        low, high = self.gaussian[u] - self.width[u], self.gaussian[u] + self.width[u]
        upper = self.dithered[u] + self.dim * SPACE_FILLING_BITS
        bits = np.array([self.dithered[u], upper, *np.minimum([self.gaussian[u], low, high], limit)])
        return bits, {name for name, raised in flags.items() if raised}


def gaussian_bits(covariance: Tensor, count: int) -> Tensor:
    """I_G of x and its decoded copy, from their joint covariance [..., 2 D, 2 D]; NaN from too few tokens."""
    return information_or_nan_bits(regular(covariance), covariance.shape[-1] // 2, count)


def dithered_bits(moments: Moments) -> Tensor:
    """The Gaussian value of the dithered channel of x and its decoded copy [...]; NaN from one token."""
    covariance, count = moments.covariance(torch.arange(moments.groups, device=moments.counts.device))
    if count < 2:
        return torch.full(covariance.shape[:-2], torch.nan, dtype=covariance.dtype, device=covariance.device)
    return channel_bits(covariance, count)


def _head_rows(
    allocation: Allocation, head: Head, rates: CodeRates, estimates: Mapping[Piece, _Estimates]
) -> list[dict[str, Any]]:
    """Keys, values, both."""
    rows = [_part_row(allocation, head, part, rates, estimates) for part in PARTS]
    keys, values = rows
    both = {name: keys[name] + values[name] for name in (*RATES, *INFORMATION)}
    flags = ", ".join(sorted({flag for row in rows for flag in row["flags"].split(", ") if flag}))
    return [*rows, {**keys, **both, "part": "both", "flags": flags}]


def _part_row(
    allocation: Allocation, head: Head, part: Part, rates: CodeRates, estimates: Mapping[Piece, _Estimates]
) -> dict[str, Any]:
    head_plan, dim = plan_of(allocation.plans, head), allocation.shape.layers[head[0]].head_dim
    plan = head_plan or RAW
    total, kept = np.zeros(len(INFORMATION)), 0
    flags: set[str] = set()
    for t, (count, pieces) in enumerate(zip(plan.counts(rates.tokens), pieces_of(plan))):
        tokens = int(count.sum())
        if tokens:
            bits, raised = estimates[pieces[part]].of(head, side_bits(plan, t, part, rates.tokens, dim) / tokens)
            total, flags, kept = total + tokens * bits, flags | raised, kept + tokens
    rate = rates.of(head_plan, head, part)
    return {
        "layer": head[0],
        "head": head[1],
        "part": part,
        "kept_tokens": kept / len(rates.lengths),
        **dict(zip(RATES, (rate.stored_bits, rate.entropy_bits, rate.code_bits, rate.tight_bits))),
        **dict(zip(INFORMATION, total / rates.lengths.sum())),
        "flags": ", ".join(sorted(flags)) if kept else NOTHING_KEPT if rates.tokens.any() else ALL_PINNED,
    }


def _usable(allocation: Allocation, replays: Replays) -> list[list[float]]:
    """USABLE of each head, then of the whole cache, in bits per predicted token."""
    shape = allocation.shape
    nothing = HeadPlan(RAW.format)
    tried: list[PlansToTry] = []
    for layer, head in shape.heads:
        for plan in (nothing, plan_of(allocation.plans, (layer, head))):
            heads: list[HeadPlan | None] = [None] * shape.layers[layer].kv_heads
            heads[head] = plan
            tried.append([heads if i == layer else None for i in range(len(shape.layers))])
    kl_bits, _ = replays.measure([*tried, null_plans(shape), allocation.plans], show="measuring heads")
    rows = []
    for evicted, compressed in kl_bits.T.reshape(-1, 2, len(kl_bits)):
        retained = evicted - compressed
        rows.append([float(retained.mean()), *bootstrap_interval(retained), float(evicted.mean())])
    return rows
