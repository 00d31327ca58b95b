"""What the caches of one calibration share, and the limit in bytes that they keep to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import floor, log10, nan
from typing import Any

import numpy as np
from ib_kernels import FORMATS, Bases, in_bases, tokens_nbytes

from ib_analysis.cache.key_bases import KeyBases
from ib_analysis.cache.plan import EVICTED, QUANTIZED_FORM, RAW, Head, HeadPlan, Plans, PlansToTry, Recent, plan_of
from ib_analysis.cache.tiers import Count
from ib_analysis.errors import BudgetError, CalibrationError
from ib_analysis.model.shape import CacheShape, LayerShape
from ib_analysis.scorers import Scorer, get_scorer, scorer_to_json

# Budgets are checked up to so many times the context length, and so many tokens beyond it; then fixed costs are a smaller share.
LONGEST, BEYOND = 8, 2**20
BLOCK = 2**16  # lengths that are tried at once


@dataclass(frozen=True)
class CacheSpec:
    """The model's cache, the tokens that every head keeps, the scorer that ranks the others, and the bases of their keys."""

    shape: CacheShape
    recent: Recent
    scorer: Scorer
    bases: KeyBases | None = None  # of formats that store keys in them

    @property
    def formats(self) -> list[str]:
        """Names of the formats that every head can have: without bases of all of them, none that stores keys in them."""
        based = self.bases is not None and all(self.bases.of_layer(layer) is not None for layer in self.shape.compressible)
        return [name for name, fmt in FORMATS.items() if based or not fmt.turns_keys]

    def uniform(self, plan: HeadPlan) -> Plans:
        """The same plan for every head that can be compressed."""
        return tuple(None if layer.sliding_window else (plan,) * layer.kv_heads for layer in self.shape.layers)

    @property
    def null_plans(self) -> Plans:
        """Every compressible token evicted."""
        return self.uniform(EVICTED)

    @property
    def full_plans(self) -> Plans:
        """Every layer left as it is."""
        return (None,) * len(self.shape.layers)

    def single_head(self, head: Head, plan: HeadPlan | None) -> PlansToTry:
        """One head under a plan, all others left as they are."""
        rows: list[list[HeadPlan | None] | None] = [None] * len(self.shape.layers)
        rows[head[0]] = [plan if h == head[1] else None for h in range(self.shape.layers[head[0]].kv_heads)]
        return rows

    def for_plans(self, plans: Plans) -> CacheSpec:
        """Without the bases of layers where these plans store no keys in them."""
        if self.bases is None:
            return self
        return replace(self, bases=self.bases.only([i for i, row in enumerate(plans) if _in_bases(row or ())]))

    def layer_bases(self, layer: int, plans: Iterable[HeadPlan | None]) -> Bases | None:
        """The bases of a layer's heads for these plans; None if no plan stores keys in them.

        Raises CalibrationError if one does, but the layer has none.
        """
        if not _in_bases(plans):
            return None
        found = None if self.bases is None else self.bases.of_layer(layer)
        if found is None:
            raise CalibrationError(
                f"plans of layer {layer} store keys in bases that the spec does not have: use them with the spec of the profile "
                "that they are from"
            )
        return found

    def mean_tier(self, plans: Plans) -> dict[str, float]:
        """Means over heads of token_share, and over what is kept of key_bits and value_bits, which are NaN where nothing is."""
        tiers = [tier for head in self.shape.heads for tier in (plan_of(plans, head) or RAW).tiers]
        kept = sum(tier.token_share for tier in tiers)
        bits = {
            name: sum(tier.token_share * getattr(tier, name) for tier in tiers) / (kept or nan)
            for name in ("key_bits", "value_bits")
        }
        return {"token_share": kept / len(self.shape.heads), **bits}

    def nbytes(self, plans: Plans, length: Count) -> Count:
        """Exact bytes of one sequence of `length` tokens in the compressible layers, at 16 bits in those left as they are."""
        tokens = self.recent.compressible(length)
        total = length * 0
        layers = Counter((layer, heads is None) for layer, heads in zip(self.shape.layers, plans) if not layer.sliding_window)
        for (layer, is_full), count in layers.items():
            total = total + count * (length * layer.bytes_per_token if is_full else self._recent_bytes(layer, length))
        for (plan, head_dim), heads_alike in self._alike(plans).items():
            total = total + heads_alike * plan.nbytes(tokens, head_dim)
        return total

    def _alike(self, plans: Plans) -> Counter[tuple[HeadPlan, int]]:
        """How many heads have each plan, by head_dim. Rows and plans are mostly the same objects, which are compared once."""
        rows = {id(row): row for row in plans if row is not None}
        same_rows = Counter((id(row), layer.head_dim) for layer, row in zip(self.shape.layers, plans) if row is not None)
        alike: Counter[tuple[HeadPlan, int]] = Counter()
        for (row, head_dim), count in same_rows.items():
            of_row = {id(plan): plan for plan in rows[row]}
            for plan, heads in Counter(map(id, rows[row])).items():
                alike[of_row[plan], head_dim] += count * heads
        return alike

    def recent_bytes(self, length: int) -> int:
        """Bytes of sinks and both windows alone."""
        return sum(self._recent_bytes(self.shape.layers[i], length) for i in self.shape.compressible)

    def _recent_bytes(self, layer: LayerShape, length: Count) -> Count:
        past = self.recent.past_window(length)
        quantized = past - self.recent.compressible(length)
        packed = tokens_nbytes(QUANTIZED_FORM[0], quantized, layer.head_dim, *QUANTIZED_FORM[1:])
        # Nothing is packed before a token leaves the window.
        return (length - past) * layer.bytes_per_token + packed * layer.kv_heads * (quantized > 0)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads. Raises UnknownNameError for a scorer that is in no registry."""
        layers = [asdict(layer) for layer in self.shape.layers]
        content = {"shape": layers, "recent": asdict(self.recent), "scorer": scorer_to_json(self.scorer)}
        return content if self.bases is None else content | {"bases": self.bases.to_json()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> CacheSpec:
        """Also from version 1, which called the tokens at 16 bits pinned."""
        shape = CacheShape(tuple(LayerShape(**layer) for layer in content["shape"]))
        recent = Recent(**content["recent" if "recent" in content else "pinned"])
        bases = KeyBases.from_json(content["bases"], shape) if "bases" in content else None
        return cls(shape, recent, get_scorer(content["scorer"]), bases)


@dataclass(frozen=True)
class ByteLimit:
    """A budget: a share of the full 16-bit cache, from a context length on. Every byte counts.

    `lowered_bytes` are taken off at the context length, so that longer contexts stay within the share, too.
    """

    spec: CacheSpec
    share: float
    context_length: int
    lowered_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes at the context length, sinks and windows included."""
        return int(self.share * self.spec.shape.bytes_per_token * self.context_length) - self.lowered_bytes

    @property
    def spare(self) -> int:
        """Bytes at the context length for all tokens but sinks and windows."""
        return self.nbytes - self.spec.recent_bytes(self.context_length)

    @property
    def longest(self) -> int:
        """The length up to which the budget is checked."""
        return min(LONGEST * self.context_length, self.context_length + BEYOND)

    def lowered(self, nbytes: int) -> ByteLimit:
        """Less by so many bytes, but not below sinks and windows, which stay within the share."""
        return replace(self, lowered_bytes=self.lowered_bytes + min(nbytes, max(0, self.spare)))

    def excess(self, plans: Plans) -> int:
        """By how many bytes a cache exceeds the share at most, from the context length on; 0 if it does not.

        Tokens leave the window some at a time, and kivi stores groups of keys whole: a cache that fits at one length may
        be too large at the next.
        """
        # The cache grows faster than the budget until tokens leave the window: only the lengths just before that matter.
        recent, length = self.spec.recent, self.context_length
        lengths = np.arange(recent.before_leaving(length), self.longest + recent.flush, recent.flush)
        return max(0, int(np.ceil(self._over(plans, lengths).max())))

    def minimum_context(self, plans: Plans) -> int:
        """The shortest length from which on the cache stays within the share, checked up to `longest`.

        Raises BudgetError if the cache does not fit even there.
        """
        for end in range(self.longest, 0, -BLOCK):
            lengths = np.arange(end, max(0, end - BLOCK), -1)
            over = lengths[self._over(plans, lengths) > 0]
            if len(over) and over[0] == self.longest:
                raise BudgetError(f"the plans exceed {self.share:.4g} of the full cache even at {over[0]} tokens")
            if len(over):
                return int(over[0]) + 1
        return 1

    def check(self) -> None:
        """Raises BudgetError, with the minimum, if not even sinks and windows fit from the context length on."""
        if self.excess(self.spec.null_plans) == 0:
            return
        fullest = self.spec.recent.before_leaving(self.context_length)
        full, minimum = self.spec.shape.bytes_per_token * fullest, self.spec.recent_bytes(fullest)
        enough = _rounded_up(minimum / full)
        raise BudgetError(
            f"a budget of {self.share:.4g} of the cache is {int(self.share * full):,} bytes at {fullest} tokens, but sinks and "
            f"windows take {minimum:,}: ask for at least {enough:.4g}, or for a longer context (longer prompts)"
        )

    def _over(self, plans: Plans, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
        """Bytes above the share at each length; negative below it."""
        lengths = np.asarray(lengths)
        return self.spec.nbytes(plans, lengths) - self.share * self.spec.shape.bytes_per_token * lengths


def _in_bases(plans: Iterable[HeadPlan | None]) -> bool:
    """Whether one of these plans stores keys in a basis."""
    return any(in_bases(plan.format, "keys", tier.key_bits) for plan in plans if plan is not None for tier in plan.tiers)


def _rounded_up(share: float) -> float:
    """A share of four digits that is above this one, unless that is all."""
    step = 10.0 ** (floor(log10(share)) - 3)
    return min(1.0, (floor(round(share / step, 6)) + 1) * step)
