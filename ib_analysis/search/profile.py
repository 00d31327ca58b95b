"""The loss table of a model: what each option of each KV head costs in bytes and in bits of information."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ib_analysis.cache.plan import HeadPlan, Plans
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.errors import ProfileMismatchError
from ib_analysis.files import load_tensors, save_tensors
from ib_analysis.search.candidates import dominates
from ib_analysis.search.knapsack import Solution, solve

VERSION = 2
TINY_BITS = 1e-12
PROMPTS_OF_LAW = 4  # that the law of heads and options is worth
TOLERANCE = 2.0  # factor between measured losses and those by the gradient up to which these are taken for the losses


@dataclass(frozen=True)
class PriceCheck:
    """Measured losses over the gradient's, of a sample of heads, each alone under its chosen option, on the same prompts."""

    heads: int
    prompts: int
    rank_correlation: float  # Spearman's, over heads
    ratio: float  # of the sums
    ratio_interval: tuple[float, float]  # 95%, a bootstrap over prompts

    @property
    def holds(self) -> bool:
        """Whether the ratio is within the tolerance, so that measuring could change little."""
        return 1 / TOLERANCE <= self.ratio <= TOLERANCE

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PriceCheck:
        return cls(**{**content, "ratio_interval": tuple(content["ratio_interval"])})

    def __str__(self) -> str:
        low, high = self.ratio_interval
        return (
            f"{self.heads} heads measured on {self.prompts} prompts: {self.ratio:.2f} [{low:.2f}, {high:.2f}] of their prices, "
            f"rank correlation {self.rank_correlation:.3f}"
        )


@dataclass(eq=False)
class Profile:
    """Losses of every option of every head, for caches of `context_length` tokens of one kind.

    A loss is that of predictive information in bits per predicted token if only that head is compressed so. The gradient
    proposes it until it is measured; a measured loss also lifts those of options that keep less.
    """

    model: str  # `model_fingerprint`
    spec: CacheSpec
    context_length: int
    prompts: int
    settings: dict[str, Any]  # how it was calibrated
    options: tuple[HeadPlan, ...]  # [O]
    loss_bits: NDArray[np.float64]  # [U, O], U heads in the order of `shape.heads`
    measured: NDArray[np.bool_]  # [U, O]
    gradient_prompts: int = 0  # that the gradient has seen so far
    checks: dict[float, PriceCheck] = field(default_factory=dict)  # of the gradient's losses, by budget share

    def nbytes(self) -> NDArray[np.int64]:
        """Bytes [U, O] of each option at the context length, sinks and window left out."""
        tokens, shape = self.spec.recent.compressible(self.context_length), self.spec.shape
        return np.stack([_options_nbytes(self.options, tokens, shape.layers[layer].head_dim) for layer, _ in shape.heads])

    def limit(self, share: float) -> ByteLimit:
        """A budget for this kind of cache, from the context length on. Raises BudgetError if nothing fits."""
        limit = ByteLimit(self.spec, share, self.context_length)
        limit.check()
        return limit

    def solve(self, limit: ByteLimit, losses: NDArray[np.float64] | None = None, gap: float = 1e-4) -> Solution:
        """The options of least total loss within the limit at the context length.

        `losses` [U, O], in any unit, stand in for those in bits; the least total is found up to the relative `gap`.
        """
        losses = self.loss_bits if losses is None else losses
        return solve(list(losses), list(self.nbytes()), limit.spare, gap=gap)

    def solve_at_all_lengths(self, limit: ByteLimit, solve: Callable[[ByteLimit], Solution]) -> tuple[Solution, ByteLimit]:
        """What `solve` finds within the limit, lowered until the choice stays within the share at longer contexts, too."""
        while excess := limit.excess(self.plans((solution := solve(limit)).choice)):
            limit = limit.lowered(excess)
        return solution, limit

    @property
    def expected_bits(self) -> NDArray[np.float64]:
        """Losses [U, O] where measured, elsewhere the gradient's, drawn toward a factor of the head times one of the option.

        What a few prompts say of one option of one head is mostly noise.
        """
        logs = np.log(np.maximum(self.loss_bits, TINY_BITS))
        head = logs.mean(1, keepdims=True)
        law = head + (logs - head).mean(0, keepdims=True)
        weight = self.gradient_prompts / (self.gradient_prompts + PROMPTS_OF_LAW)
        return np.where(self.measured, self.loss_bits, np.exp(law + weight * (logs - law)))

    @property
    def measured_bits(self) -> NDArray[np.float64]:
        """Losses [U, O] of the options that were measured, infinite for the others."""
        return np.where(self.measured, self.loss_bits, np.inf)

    def plans(self, choice: NDArray[np.int64]) -> Plans:
        """The plans in which head u has option choice[u]."""
        rows: list[list[HeadPlan]] = [[] for _ in self.spec.shape.layers]
        for (layer, _), option in zip(self.spec.shape.heads, choice.tolist()):
            rows[layer].append(self.options[option])
        return tuple(tuple(row) if row else None for row in rows)

    def record(self, head: int, option: int, loss_bits: float) -> None:
        """Enters a measured loss, and lifts the unmeasured losses of options that keep less of that head to it."""
        self.loss_bits[head, option] = loss_bits
        self.measured[head, option] = True
        lifted = self.unmeasured_below(head, option)
        self.loss_bits[head, lifted] = np.maximum(self.loss_bits[head, lifted], loss_bits)

    def unmeasured_below(self, head: int, option: int) -> NDArray[np.bool_]:
        """Which options of a head [O] are not measured and keep no more than this one; they lose no less than it does."""
        below = [dominates(self.options[option], plan) for plan in self.options]
        return ~self.measured[head] & np.array(below)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with a JSON header. Raises UnknownNameError for a scorer that is in no registry."""
        header = {
            "version": VERSION,
            "model": self.model,
            **self.spec.to_json(),
            "context_length": self.context_length,
            "prompts": self.prompts,
            "gradient_prompts": self.gradient_prompts,
            "settings": self.settings,
            "checks": [[share, asdict(check)] for share, check in self.checks.items()],
            "options": [asdict(option) for option in self.options],
        }
        tensors = {name: torch.from_numpy(getattr(self, name).copy()) for name in ("loss_bits", "measured")}
        save_tensors(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads what `save` wrote, version 1 too. Raises CorruptFileError, or ProfileMismatchError for another version."""
        tensors, header = load_tensors(Path(path))
        if header.get("version") not in (1, VERSION):
            raise ProfileMismatchError(f"{path} has format version {header.get('version')}, not {VERSION}: calibrate again")
        return cls(
            model=header["model"],
            spec=CacheSpec.from_json(header),
            context_length=header["context_length"],
            prompts=header["prompts"],
            settings=header["settings"],
            options=tuple(map(HeadPlan.from_json, header["options"])),
            loss_bits=tensors["loss_bits"].numpy(),
            measured=tensors["measured"].numpy(),
            gradient_prompts=header["priced" if header["version"] == 1 else "gradient_prompts"],
            checks={share: PriceCheck.from_json(check) for share, check in header.get("checks", [])},
        )


@lru_cache(maxsize=8)
def _options_nbytes(options: tuple[HeadPlan, ...], tokens: int, head_dim: int) -> NDArray[np.int64]:
    """Bytes [O] of each option for one head; kept, because the solver asks again and again."""
    return np.array([option.nbytes(tokens, head_dim) for option in options])
