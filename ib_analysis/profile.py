"""The measured table of a model: what each option of each KV head costs in bytes and in bits of information."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from ib_analysis.errors import ProfileMismatchError
from ib_analysis.files import load_tensors, save_tensors
from ib_analysis.knapsack import Solution, solve
from ib_analysis.options import dominates
from ib_analysis.plan import HeadPlan, Pinned, Plans, Tier, excess_bytes
from ib_analysis.shape import CacheShape, LayerShape

VERSION = 1
# Parts of a config that do not change what a model computes.
ORIGIN = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
LABELS = ("id2label", "label2id", "problem_type")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")
RETURNED = ("use_cache", "output_hidden_states", "output_attentions", "return_dict")
VOLATILE = (*ORIGIN, *LABELS, *TOKENS, *RETURNED)


@dataclass(eq=False)
class Profile:
    """Prices of every option of every head, for caches of `context_length` tokens with these pinned tokens.

    A price is the loss of predictive information in bits per predicted token if only that head is compressed so. It is
    proposed by the gradient until it is measured; a measured price also lifts those of options that keep less.
    """

    model: str  # `model_fingerprint`
    shape: CacheShape
    pinned: Pinned
    scorer: str
    context_length: int
    prompts: int
    settings: dict[str, Any]  # how it was calibrated
    options: tuple[HeadPlan, ...]  # [O]
    loss_bits: NDArray[np.float64]  # [U, O], U heads in the order of `shape.heads`
    error_bits: NDArray[np.float64]  # [U, O] standard error over prompts
    measured: NDArray[np.bool_]  # [U, O]
    priced: int = 0  # prompts that the gradient has priced so far

    def nbytes(self) -> NDArray[np.int64]:
        """Bytes [U, O] of each option at the context length, pinned tokens left out."""
        tokens = self.pinned.compressible(self.context_length)
        return np.stack(
            [_options_nbytes(self.options, tokens, self.shape.layers[layer].head_dim) for layer, _ in self.shape.heads]
        )

    def solve(self, limit_bytes: int, losses: NDArray[np.float64] | None = None, gap: float = 1e-4) -> Solution:
        """The options of least total price within `limit_bytes` for all compressible layers, pinned tokens included.

        `losses` [U, O], in any unit, stand in for the prices; the least total is found up to the relative `gap`.
        """
        pinned_bytes = sum(self.pinned.nbytes(self.context_length, self.shape.layers[i]) for i in self.shape.compressible)
        prices = self.loss_bits if losses is None else losses
        return solve(list(prices), list(self.nbytes()), limit_bytes - pinned_bytes, gap=gap)

    @property
    def measured_bits(self) -> NDArray[np.float64]:
        """Prices [U, O] of the options that were measured, infinite for the others."""
        return np.where(self.measured, self.loss_bits, np.inf)

    def plans(self, choice: NDArray[np.int64]) -> Plans:
        """The plans in which head u has option choice[u]."""
        rows: list[list[HeadPlan]] = [[] for _ in self.shape.layers]
        for (layer, _), option in zip(self.shape.heads, choice.tolist()):
            rows[layer].append(self.options[option])
        return tuple(tuple(row) if row else None for row in rows)

    def excess_bytes(self, choice: NDArray[np.int64], share: float) -> int:
        """By how much a cache with option choice[u] for head u exceeds a budget at most, from the context length on."""
        return excess_bytes(self.shape, self.plans(choice), self.pinned, share, self.context_length)

    def record(self, head: int, option: int, loss_bits: float, error_bits: float) -> None:
        """Enters a measured price, and lifts the unmeasured prices of options that keep less of that head to it."""
        self.loss_bits[head, option], self.error_bits[head, option] = loss_bits, error_bits
        self.measured[head, option] = True
        lifted = self.unmeasured_below(head, option)
        self.loss_bits[head, lifted] = np.maximum(self.loss_bits[head, lifted], loss_bits)

    def unmeasured_below(self, head: int, option: int) -> NDArray[np.bool_]:
        """Which options of a head [O] are not measured and keep no more than this one; they lose no less than it does."""
        below = [dominates(self.options[option], plan) for plan in self.options]
        return ~self.measured[head] & np.array(below)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with a JSON header."""
        header = {
            "version": VERSION,
            "model": self.model,
            "shape": [asdict(layer) for layer in self.shape.layers],
            "pinned": asdict(self.pinned),
            "scorer": self.scorer,
            "context_length": self.context_length,
            "prompts": self.prompts,
            "priced": self.priced,
            "settings": self.settings,
            "options": [asdict(option) for option in self.options],
        }
        tensors = {name: torch.from_numpy(getattr(self, name).copy()) for name in ("loss_bits", "error_bits", "measured")}
        save_tensors(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads what `save` wrote. Raises CorruptFileError, or ProfileMismatchError for another version."""
        tensors, header = load_tensors(Path(path))
        if header.get("version") != VERSION:
            raise ProfileMismatchError(f"{path} has format version {header.get('version')}, not {VERSION}: calibrate again")
        return cls(
            model=header["model"],
            shape=CacheShape(tuple(LayerShape(**layer) for layer in header["shape"])),
            pinned=Pinned(**header["pinned"]),
            scorer=header["scorer"],
            context_length=header["context_length"],
            prompts=header["prompts"],
            settings=header["settings"],
            options=tuple(plan_from_json(option) for option in header["options"]),
            priced=header["priced"],
            **{name: tensor.numpy() for name, tensor in tensors.items()},
        )


@lru_cache(maxsize=8)
def _options_nbytes(options: tuple[HeadPlan, ...], tokens: int, head_dim: int) -> NDArray[np.int64]:
    """Bytes [O] of each option for one head; kept, because the solver asks again and again."""
    return np.array([option.nbytes(tokens, head_dim) for option in options])


def plan_from_json(content: dict[str, Any]) -> HeadPlan:
    return HeadPlan(content["format"], tuple(Tier(**tier) for tier in content["tiers"]))


def model_fingerprint(config: PreTrainedConfig) -> str:
    """A hash of all that a config says about the model's shape."""
    content = {key: value for key, value in config.to_dict().items() if key not in VOLATILE}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
