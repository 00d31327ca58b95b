"""An allocation: what every layer and KV head keeps, with the evidence for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.cache.attention import use_attention
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.cache.lost_cache import warn_if_lost
from ib_analysis.cache.plan import Plans
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.cache.table import tier_table
from ib_analysis.errors import ProfileMismatchError
from ib_analysis.figures.heads import draw_heads
from ib_analysis.model.fingerprint import model_fingerprint
from ib_analysis.model.load import check_model
from ib_analysis.replay.examples import Prompts
from ib_analysis.replay.measurement import Measurement, measure_prompts
from ib_analysis.scorers import scorer_name
from ib_analysis.search.saved_allocation import allocation_json, read_allocation


@dataclass(frozen=True)
class Allocation:
    """What every layer and KV head keeps within a budget. Information is in bits per predicted token.

    Build one with `optimal_allocation`. `plans` has a row of head plans for each layer, None for a layer at full precision.
    """

    model: str  # fingerprint of the model's config
    spec: CacheSpec
    plans: Plans
    context_length: int  # of the prompts that it was calibrated on, or at which a budget in bytes was to hold
    budget_share: float  # of the full 16-bit cache
    source: str  # how the plans were found
    loss_sum_bits: float  # over heads: by the "usable" objective the losses of compressing each of them alone
    in_sample_loss_bits: float  # of compressing all of them, measured on all prompts that it was made with
    solver_gap: float  # how far the knapsack's solution may be above the least sum of losses, relative to it
    dual_bound: float  # no choice of the options that the knapsack had within the budget has a smaller sum of losses
    validation: Measurement | None  # on the prompts that decided, a third of all; after `validate` on those passed to it
    budget_curve: tuple[tuple[float, float], ...] = ()  # (share of the full cache, sum of losses in bits)
    objective: str = "usable"  # what losses are of; other objectives count bits per context token, not predicted token

    @property
    def limit(self) -> ByteLimit:
        """The budget."""
        return ByteLimit(self.spec, self.budget_share, self.context_length)

    @property
    def held_out_ratio(self) -> float:
        """Measured loss divided by the in-sample loss; NaN if nothing was measured or nothing is lost.

        An independent check only after `validate` on other prompts.
        """
        if self.validation is None or self.in_sample_loss_bits <= 0:
            return float("nan")
        return self.validation.loss_bits / self.in_sample_loss_bits

    @property
    def interaction(self) -> float:
        """In-sample loss divided by the sum of losses: above 1 where heads stand in for each other.

        NaN if nothing is lost, or if losses are of another objective.
        """
        if self.objective != "usable" or self.loss_sum_bits <= 0:
            return float("nan")
        return self.in_sample_loss_bits / self.loss_sum_bits

    @property
    def retained_bits(self) -> float:
        """Information about the next token that the cache retains, measured on the validation prompts."""
        return float("nan") if self.validation is None else self.validation.retained_bits

    @property
    def retained_share(self) -> float:
        """Of the information that the full cache carries, the share that is retained; negative if it misleads."""
        return float("nan") if self.validation is None else self.validation.retained_share

    @property
    def is_full(self) -> bool:
        """Whether nothing is compressed."""
        return all(row is None for row in self.plans)

    @property
    def minimum_context(self) -> int:
        """The shortest length from which on the cache stays within the budget."""
        return self.limit.minimum_context(self.plans)

    def nbytes(self, context_length: int) -> int:
        """Exact bytes of one sequence's cache at a length in tokens, sliding-window layers left out.

        A layer that is not compressed counts 16 bits an element; in a float32 model it really holds 32.
        """
        return int(self.spec.nbytes(self.plans, int(context_length)))

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises ProfileMismatchError if the allocation is for another model, UnsupportedModelError if it is none."""
        check_model(model)
        found = model_fingerprint(model.config)
        if found != self.model:
            raise ProfileMismatchError(
                f"this allocation was made for another model (config {self.model}, not {found}): make one for this model"
            )

    def cache(self, model: PreTrainedModel) -> CompressedCache:
        """An empty cache for `model.generate(**inputs, **cache_argument(model, cache))`.

        Switches the model to our attention function, for good: without a cache of ours it computes what SDPA does. Warns where
        `generate` of this model does not use the cache that it is given.
        Raises ProfileMismatchError if the allocation is for another model.
        """
        self.check_model(model)
        use_attention(model)
        warn_if_lost(model)
        return CompressedCache(self.spec, self.plans)

    def table(self) -> pd.DataFrame:
        """One row for each tier of each head: format, share of tokens, bits, bytes at the calibrated context length."""
        return tier_table(self.spec, self.plans, self.context_length)

    def curve(self) -> pd.DataFrame:
        """The least sum of losses at every budget, from the same profile: columns budget_share, loss_sum_bits."""
        return pd.DataFrame(list(self.budget_curve), columns=["budget_share", "loss_sum_bits"])

    def plot(self, path: str | Path | None = None) -> Figure:
        """Heatmaps, layer by head, of tokens kept and bits; with `path` also written there as PDF, PNG and CSV."""
        return draw_heads(self.table(), path)

    def validate(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        question_aware: bool = True,
        seed: int = 1,
    ) -> Allocation:
        """The same allocation with its loss measured on `prompts`, which should not be those of the calibration."""
        self.check_model(model)
        found = measure_prompts(
            model, self.spec, self.plans, prompts, tokenizer=tokenizer, question_aware=question_aware, seed=seed
        )
        return replace(self, validation=found)

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text with a schema version and a checksum; with `path` it is also written there.

        Raises UnknownNameError for a scorer that is not in SCORERS.
        """
        return allocation_json(vars(self), path)

    @classmethod
    def from_json(cls, source: str | Path) -> Allocation:
        """Reads the text, or the file, that `to_json` wrote, of schema version 1 too.

        Raises CorruptFileError if it was cut or edited, ProfileMismatchError for another schema version or other fields,
        FileNotFoundError if no such file exists.
        """
        return read_allocation(cls, source)

    def __str__(self) -> str:
        length = self.context_length
        lines = [
            f"{self.source}: {self.budget_share:.4g} of the 16-bit cache, {self.nbytes(length):,} bytes at {length} tokens "
            f"(from {self.minimum_context} tokens on)",
            *(["nothing is compressed"] if self.is_full else self._compression_text()),
        ]
        if self.validation is not None:
            lines.append(f"measured: {self.validation}, held-out ratio {self.held_out_ratio:.2f}")
        sliding = [i for i, layer in enumerate(self.spec.shape.layers) if layer.sliding_window]
        if sliding:
            lines.append(f"layers {sliding} have a sliding window and stay at full precision")
        return "\n".join(lines if self.is_full else [*lines, self.table().to_string(index=False)])

    def _compression_text(self) -> list[str]:
        bases = self.spec.bases
        return [
            f"every head keeps {self.spec.recent}; other tokens are ranked by {scorer_name(self.spec.scorer)}",
            f"in-sample loss {self.in_sample_loss_bits:.4g} bits per token; {self.objective} loss of heads alone "
            f"{self.loss_sum_bits:.4g}; the knapsack's dual bound {self.dual_bound:.4g}, solver gap {self.solver_gap:.1e}",
            *([] if bases is None else [f"bases of keys take {bases.nbytes:,} bytes beside the model's weights"]),
        ]
