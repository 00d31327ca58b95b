"""An allocation: what every layer and KV head keeps, with the evidence for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.attention import use_attention
from ib_analysis.cache import CompressedCache
from ib_analysis.calibration import Replays
from ib_analysis.episodes import make_episodes
from ib_analysis.errors import BudgetError, CorruptFileError, ProfileMismatchError
from ib_analysis.figures.heads import head_table, plot_heads
from ib_analysis.figures.style import save_figure
from ib_analysis.files import number_from_json, read_sealed_json, sealed_json, write_whole
from ib_analysis.measurement import Measurement, measure_plans
from ib_analysis.models import check_model
from ib_analysis.plan import LONGEST, Pinned, Plans, plans_nbytes
from ib_analysis.profile import model_fingerprint, plan_from_json
from ib_analysis.scorers import SCORERS
from ib_analysis.shape import CacheShape, LayerShape
from ib_analysis.tasks import Prompt

VERSION = 1
NUMBERS = ("price_sum_bits", "predicted_loss_bits", "solver_gap", "dual_bound")  # that may be NaN, null in JSON


@dataclass(frozen=True)
class Allocation:
    """What every layer and KV head keeps within a budget. Information is in bits per predicted token.

    Build one with `optimal_allocation`. `plans` has a row of head plans for each layer, None for a layer at full precision.
    """

    model: str  # fingerprint of the model's config
    shape: CacheShape
    plans: Plans
    pinned: Pinned
    scorer: str
    context_length: int  # of the prompts that it was calibrated on, or at which a budget in bytes was to hold if that is shorter
    budget_share: float  # of the full 16-bit cache
    source: str  # how the plans were found
    price_sum_bits: float  # sum of the heads' prices: by the "usable" objective the losses of compressing each of them alone
    predicted_loss_bits: float  # loss of compressing all of them, measured on all prompts that it was made with
    solver_gap: float  # how far the knapsack's solution may be above the least sum of prices, relative to it
    dual_bound: float  # no choice of the options that the knapsack had within the budget has a smaller sum of prices
    validation: Measurement | None  # on the prompts that decided, a third of all; after `validate` on those passed to it
    budget_curve: tuple[tuple[float, float], ...] = ()  # (share of the full cache, sum of prices in bits)
    objective: str = "usable"  # what prices are losses of; other objectives count bits per context token, not predicted token

    @property
    def model_error(self) -> float:
        """Measured loss divided by predicted loss; NaN if nothing was measured or nothing is lost.

        An independent check only after `validate` on other prompts.
        """
        if self.validation is None or self.predicted_loss_bits <= 0:
            return float("nan")
        return self.validation.loss_bits / self.predicted_loss_bits

    @property
    def interaction(self) -> float:
        """Predicted loss divided by the sum of prices: above 1 where heads stand in for each other.

        NaN if nothing is lost, or if prices are of another objective than the loss.
        """
        if self.objective != "usable" or self.price_sum_bits <= 0:
            return float("nan")
        return self.predicted_loss_bits / self.price_sum_bits

    @property
    def retained_bits(self) -> float:
        """Information about the next token that the cache retains, measured on the validation prompts."""
        return float("nan") if self.validation is None else self.validation.retained_bits

    @property
    def retained_share(self) -> float:
        """Of the information that the full cache carries, the share that is retained; negative if it misleads."""
        return float("nan") if self.validation is None else self.validation.retained_share

    def nbytes(self, context_length: int) -> int:
        """Exact bytes of one sequence's cache at a length in tokens, sliding-window layers left out.

        A layer that is not compressed counts 16 bits an element; in a float32 model it really holds 32.
        """
        return int(plans_nbytes(self.shape, self.plans, self.pinned, int(context_length)))

    @property
    def is_full(self) -> bool:
        """Whether nothing is compressed."""
        return all(row is None for row in self.plans)

    @property
    def minimum_context(self) -> int:
        """The shortest length from which on the cache stays within the budget."""
        return minimum_context(self.shape, self.plans, self.pinned, self.budget_share, self.context_length)

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises ProfileMismatchError if the allocation is for another model, UnsupportedModelError if it is none."""
        check_model(model)
        found = model_fingerprint(model.config)
        if found != self.model:
            raise ProfileMismatchError(
                f"this allocation was made for another model (config {self.model}, not {found}): make one for this model"
            )

    def cache(self, model: PreTrainedModel) -> CompressedCache:
        """An empty cache for `model.generate(..., past_key_values=...)`; switches the model to our attention function.

        Raises ProfileMismatchError if the allocation is for another model.
        """
        self.check_model(model)
        use_attention(model)
        return CompressedCache(self.shape, self.plans, self.pinned, SCORERS[self.scorer])

    def table(self) -> pd.DataFrame:
        """One row for each tier of each head: format, share of tokens, bits, bytes at the calibrated context length."""
        tokens = self.pinned.compressible(self.context_length)
        rows = []
        for i, h in self.shape.heads:
            layer, row = self.shape.layers[i], self.plans[i]
            if row is None:
                rows.append((i, h, 0, "full", 1.0, 16, 16, tokens * layer.bytes_per_token // layer.kv_heads))
                continue
            nbytes = row[h].nbytes(tokens, layer.head_dim)
            for t, tier in enumerate(row[h].tiers):
                rows.append((i, h, t, row[h].format, tier.share, tier.key_bits, tier.value_bits, nbytes))
            if not row[h].tiers:
                rows.append((i, h, 0, "evicted", 0.0, 0, 0, 0))
        columns = ["layer", "head", "tier", "format", "token_share", "key_bits", "value_bits", "head_bytes"]
        return pd.DataFrame(rows, columns=columns)

    def curve(self) -> pd.DataFrame:
        """The least sum of prices at every budget, from the same profile: columns budget_share, price_sum_bits."""
        return pd.DataFrame(list(self.budget_curve), columns=["budget_share", "price_sum_bits"])

    def plot(self, path: str | Path | None = None) -> Figure:
        """Heatmaps, layer by head, of tokens kept and bits; with `path` also written there as PDF, PNG and CSV."""
        heads = head_table(self.table())
        figure = plot_heads(heads)
        if path is not None:
            save_figure(figure, heads, Path(path))
        return figure

    def validate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Prompt | str | Tensor],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        question_aware: bool = True,
        seed: int = 1,
    ) -> Allocation:
        """The same allocation with its loss measured on `prompts`, which should not be those of the calibration."""
        self.check_model(model)
        episodes = make_episodes(model, tokenizer, prompts, question_aware=question_aware, seed=seed)
        replays = Replays(model, self.shape, self.pinned, self.scorer, episodes)
        return replace(self, validation=measure_plans(replays, [self.plans])[0])

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text with a schema version and a checksum; with `path` it is also written there."""
        content = {"schema": VERSION, **asdict(self)}
        content["shape"] = [asdict(layer) for layer in self.shape.layers]
        text = sealed_json(_finite(content))
        if path is not None:
            write_whole(Path(path), lambda partial: partial.write_text(text))
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Allocation:
        """Reads the text, or the file, that `to_json` wrote.

        Raises CorruptFileError if it was cut or edited, ProfileMismatchError for another schema version or other fields,
        FileNotFoundError if no such file exists.
        """
        text = source.lstrip("\ufeff \t\r\n") if isinstance(source, str) else None
        is_text = text is not None and text[:1] in ("", "{")
        name = "the allocation" if is_text else str(source)
        content = read_sealed_json(str(text) if is_text else _read_text(Path(source)), name)
        if content.pop("schema", None) != VERSION:
            raise ProfileMismatchError(f"{name} has another schema version than {VERSION}: optimise again")
        try:
            return cls._from_content(content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ProfileMismatchError(f"{name} has other fields than an allocation ({error}): optimise again") from error

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> Allocation:
        return cls(
            **{
                **content,
                **{name: number_from_json(content[name]) for name in NUMBERS},
                "shape": CacheShape(tuple(LayerShape(**layer) for layer in content["shape"])),
                "plans": tuple(None if row is None else tuple(plan_from_json(plan) for plan in row) for row in content["plans"]),
                "pinned": Pinned(**content["pinned"]),
                "validation": Measurement.from_json(content["validation"]),
                "budget_curve": tuple((share, number_from_json(loss)) for share, loss in content["budget_curve"]),
            }
        )

    def __str__(self) -> str:
        length = self.context_length
        lines = [
            f"{self.source}: {self.budget_share:.4g} of the 16-bit cache, {self.nbytes(length):,} bytes at {length} tokens "
            f"(from {self.minimum_context} tokens on)",
        ]
        if self.is_full:
            lines.append("nothing is compressed")
        else:
            lines += self._compression_text()
        if self.validation is not None:
            lines.append(f"measured: {self.validation}, model error {self.model_error:.2f}")
        sliding = [i for i, layer in enumerate(self.shape.layers) if layer.sliding_window]
        if sliding:
            lines.append(f"layers {sliding} have a sliding window and stay at full precision")
        return "\n".join(lines if self.is_full else [*lines, self.table().to_string(index=False)])

    def _compression_text(self) -> list[str]:
        return [
            f"pinned at 16 bits: {self.pinned.sinks} sinks, {self.pinned.window} to "
            f"{self.pinned.window + self.pinned.flush - 1} recent tokens",
            f"predicted loss {self.predicted_loss_bits:.4g} bits per token; {self.objective} loss of heads alone "
            f"{self.price_sum_bits:.4g}; the knapsack's dual bound {self.dual_bound:.4g}, solver gap {self.solver_gap:.1e}",
        ]


def minimum_context(shape: CacheShape, plans: Plans, pinned: Pinned, share: float, context_length: int) -> int:
    """The shortest length from which on the cache stays within `share` of the full 16-bit cache.

    Checked up to eight times the context length.
    Raises BudgetError if the cache does not fit even there.
    """
    lengths = np.arange(1, LONGEST * context_length + 1)
    over = np.flatnonzero(plans_nbytes(shape, plans, pinned, lengths) > share * shape.bytes_per_token * lengths)
    if len(over) and over[-1] == len(lengths) - 1:
        raise BudgetError(f"the plans exceed {share:.4g} of the full cache even at {len(lengths)} tokens")
    return int(lengths[over[-1]]) + 1 if len(over) else 1


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder: pass the allocation.json in it")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path} is no text, so no allocation ({error}): write it again") from error


def _finite(content: Any) -> Any:
    """JSON has no infinities or NaN: they become null."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not np.isfinite(content) else content
