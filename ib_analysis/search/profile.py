"""The loss table of a model: what each option of each KV head costs in bytes and in bits of information."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ib_analysis.cache.key_bases import KeyBases
from ib_analysis.cache.plan import MAX_LENGTH, HeadPlan, Plans
from ib_analysis.cache.spec import ByteLimit, CacheSpec
from ib_analysis.errors import ProfileMismatchError
from ib_analysis.files import load_tensors, save_tensors
from ib_analysis.search.knapsack import Solution, solve
from ib_analysis.search.price_law import PriceLaw, Table, price_law

VERSION = 3
TABLES = {"prompt_prices": "float32", "loss_bits": "float64", "error_bits": "float64", "measured_prompts": "int64"}
BASES = "bases."  # and the number of a layer: names of tensors that are no tables
TINY_BITS = 1e-12
PROMPTS_OF_LAW = 4  # that the law of heads and options is worth
TOLERANCE = 2.0  # factor between measured losses and prices up to which prices are taken for losses


@dataclass(frozen=True)
class PriceCheck:
    """Measured losses over prices, of a sample of heads, each alone under its chosen option, on the same prompts."""

    heads: int
    prompts: int
    rank_correlation: float  # Spearman's, over heads
    ratio: float  # of the sums
    ratio_interval: tuple[float, float]  # 95%, a bootstrap over prompts

    @property
    def holds(self) -> bool:
        """Whether the ratio is within the tolerance: what measuring gains then is within its own error."""
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

    A loss is that of predictive information in bits per predicted token if only that head is compressed so; a price is what the
    gradient says of it.
    """

    model: str  # `model_fingerprint`
    spec: CacheSpec
    context_length: int
    prompts: int
    settings: dict[str, Any]  # how it was calibrated
    options: tuple[HeadPlan, ...]  # [O]
    prompt_prices: NDArray[np.float32]  # [prompts so far, U, O] in bits, U heads in the order of `shape.heads`
    loss_bits: Table  # [U, O], means over the prompts that they were measured on; NaN where there are none
    error_bits: Table  # [U, O], standard errors of these; 0 if they were measured on all prompts
    measured_prompts: NDArray[np.int64]  # [U, O]
    checks: dict[float, PriceCheck] = field(default_factory=dict)  # of prices, by budget share

    @classmethod
    def unmeasured(cls, prompt_prices: NDArray[np.float32], **known: Any) -> Profile:
        """A profile of prices alone."""
        size = prompt_prices.shape[1:]
        return cls(
            prompt_prices=prompt_prices,
            loss_bits=np.full(size, np.nan),
            error_bits=np.full(size, np.nan),
            measured_prompts=np.zeros(size, np.int64),
            **known,
        )

    def nbytes(self) -> NDArray[np.int64]:
        """Bytes [U, O] of each option at the context length, sinks and windows left out."""
        tokens, shape = self.spec.recent.compressible(self.context_length), self.spec.shape
        return np.stack([_options_nbytes(self.options, tokens, shape.layers[layer].head_dim) for layer, _ in shape.heads])

    def limit(self, share: float) -> ByteLimit:
        """A budget for this kind of cache, from the context length on. Raises BudgetError if nothing fits."""
        limit = ByteLimit(self.spec, share, self.context_length)
        limit.check()
        return limit

    def solve(self, limit: ByteLimit, losses: NDArray[np.float64] | None = None, gap: float = 1e-4) -> Solution:
        """The options of least total loss within the limit at the context length.

        `losses` [U, O], in any unit, stand in for those expected; the least total is found up to the relative `gap`.
        """
        losses = self.expected_bits if losses is None else losses
        return solve(list(losses), list(self.nbytes()), limit.spare, gap=gap)

    def solve_at_all_lengths(self, limit: ByteLimit, solve: Callable[[ByteLimit], Solution]) -> tuple[Solution, ByteLimit]:
        """What `solve` finds within the limit, lowered until the choice stays within the share at longer contexts, too."""
        while excess := limit.excess(self.plans((solution := solve(limit)).choice)):
            limit = limit.lowered(excess)
        return solution, limit

    @property
    def price_bits(self) -> Table:
        """Means [U, O] over the prompts so far."""
        means: Table = self.prompt_prices.mean(0, dtype=np.float64)
        return means

    @property
    def shrunk_prices(self) -> Table:
        """Prices [U, O], shrunk toward a factor of the head times one of the option: of one option of one head, a few prompts
        say mostly noise."""
        logs = np.log(np.maximum(self.price_bits, TINY_BITS))
        head = logs.mean(1, keepdims=True)
        law = head + (logs - head).mean(0, keepdims=True)
        weight = len(self.prompt_prices) / (len(self.prompt_prices) + PROMPTS_OF_LAW)
        return np.exp(law + weight * (logs - law))

    @property
    def law(self) -> PriceLaw:
        """The losses of all options, given those measured."""
        return price_law(self.shrunk_prices, self.loss_bits, self.error_bits)

    @property
    def expected_bits(self) -> Table:
        """Losses [U, O] as measured, and what these and prices say of others."""
        return self.law.expected

    def plans(self, choice: NDArray[np.int64]) -> Plans:
        """The plans in which head u has option choice[u]."""
        rows: list[list[HeadPlan]] = [[] for _ in self.spec.shape.layers]
        for (layer, _), option in zip(self.spec.shape.heads, choice.tolist()):
            rows[layer].append(self.options[option])
        return tuple(tuple(row) if row else None for row in rows)

    def record(self, head: int, option: int, losses_bits: NDArray[np.float64]) -> None:
        """Enters losses measured on so many prompts, in place of those measured on fewer."""
        count, loss_bits = len(losses_bits), losses_bits.mean()
        self.loss_bits[head, option], self.measured_prompts[head, option] = loss_bits, count
        if count == self.prompts:
            self.error_bits[head, option] = 0.0
        else:  # one prompt alone tells no error: as large as the loss
            spread = losses_bits.std(ddof=1) if count > 1 else loss_bits
            self.error_bits[head, option] = spread * np.sqrt(1 / count - 1 / self.prompts)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with a JSON header. Raises UnknownNameError for a scorer that is in no registry."""
        layers = () if self.spec.bases is None else self.spec.bases.layers
        header = {
            "version": VERSION,
            "model": self.model,
            **replace(self.spec, bases=None).to_json(),
            "context_length": self.context_length,
            "prompts": self.prompts,
            "settings": self.settings,
            "checks": [[share, asdict(check)] for share, check in self.checks.items()],
            "options": [asdict(option) for option in self.options],
        }
        tensors = {name: torch.from_numpy(getattr(self, name).copy()) for name in TABLES}
        tensors |= {f"{BASES}{i}": layer for i, layer in enumerate(layers) if layer is not None}
        save_tensors(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads what `save` wrote, in all versions. Raises CorruptFileError, ProfileMismatchError for an unknown version."""
        tensors, header = load_tensors(Path(path))
        if header.get("version") not in (1, 2, VERSION):
            raise ProfileMismatchError(f"{path} has format version {header.get('version')}, not {VERSION}: calibrate again")
        try:
            return cls(**_fields(tensors, header))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise ProfileMismatchError(f"{path} has other contents than a profile ({error!r}): calibrate again") from error


def _fields(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> dict[str, Any]:
    """The fields of a profile. Raises ValueError if tables do not fit each other."""
    spec = CacheSpec.from_json(header)
    layers = tuple(tensors.pop(f"{BASES}{i}", None) for i in range(len(spec.shape.layers)))
    if any(layer is not None for layer in layers):
        spec = replace(spec, bases=KeyBases(layers))
    tables = {name: tensor.numpy() for name, tensor in tensors.items()}
    if header["version"] < VERSION:
        tables = _older_tables(tables, header["priced" if header["version"] == 1 else "gradient_prompts"], header["prompts"])
    options = tuple(map(HeadPlan.from_json, header["options"]))
    size = len(spec.shape.heads), len(options)
    for name, dtype in TABLES.items():
        if tables[name].dtype != dtype or tables[name].shape[-2:] != size or tables[name].ndim != 2 + (name == "prompt_prices"):
            raise ValueError(f"{name} is {tables[name].dtype} {tables[name].shape}, not {dtype} of {size} heads and options")
    if not (0 < header["context_length"] <= MAX_LENGTH and len(tables["prompt_prices"]) <= header["prompts"]):
        raise ValueError(f"{header['prompts']} prompts of {header['context_length']} tokens")
    return {
        "model": header["model"],
        "spec": spec,
        "context_length": header["context_length"],
        "prompts": header["prompts"],
        "settings": dict(header["settings"]),
        "options": options,
        **{name: tables[name] for name in TABLES},
        "checks": {share: PriceCheck.from_json(check) for share, check in header.get("checks", [])},
    }


def _older_tables(tables: dict[str, NDArray[Any]], priced: int, prompts: int) -> dict[str, NDArray[Any]]:
    """Tables of version 1 and 2: means of prices, in which losses measured on all prompts had been written over prices."""
    means, measured = tables["loss_bits"], tables["measured"]
    if means.dtype != np.float64 or measured.dtype != np.bool_:
        raise ValueError(f"loss_bits are {means.dtype} and measured {measured.dtype}")
    return {
        "prompt_prices": np.repeat(means[None].astype(np.float32), priced, axis=0),
        "loss_bits": np.where(measured, means, np.nan),
        "error_bits": np.where(measured, 0.0, np.nan),
        "measured_prompts": np.where(measured, prompts, 0),
    }


@lru_cache(maxsize=8)
def _options_nbytes(options: tuple[HeadPlan, ...], tokens: int, head_dim: int) -> NDArray[np.int64]:
    """Bytes [O] of each option for one head; kept, because the solver asks again and again."""
    return np.array([option.nbytes(tokens, head_dim) for option in options])
