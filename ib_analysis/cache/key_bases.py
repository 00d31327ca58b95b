"""The bases that a model's keys are stored in by formats that ask for them. They belong to the model, as its weights do."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from ib_kernels import Bases
from torch import Tensor

from ib_analysis.cache.plan import Head
from ib_analysis.model.shape import CacheShape, LayerShape


@dataclass(frozen=True, eq=False)
class KeyBases:
    """For each layer fp16 [H_kv, D, D], what keys are multiplied by; None for a layer without."""

    layers: tuple[Tensor | None, ...] = field(repr=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeyBases) or len(self.layers) != len(other.layers):
            return False
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(self.layers, other.layers))

    def __hash__(self) -> int:
        return hash(len(self.layers))

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices of all heads as they are used, in fp32; once for the model, not for each sequence."""
        return sum(2 * layer.numel() * 4 for layer in self.layers if layer is not None)

    def of_layer(self, layer: int) -> Bases | None:
        """Those of the KV heads of one layer."""
        return self._bases[layer]

    def of(self, heads: Sequence[Head]) -> Bases:
        """Those of some heads, all of which have one, in their order."""
        found = [(bases, h) for bases, h in ((self._bases[layer], h) for layer, h in heads) if bases is not None]
        assert len(found) == len(heads)
        return Bases(torch.stack([bases.into[h] for bases, h in found]), torch.stack([bases.back[h] for bases, h in found]))

    def only(self, layers: Sequence[int]) -> KeyBases | None:
        """Those of these layers alone; None if there is none."""
        left = tuple(matrices if i in layers else None for i, matrices in enumerate(self.layers))
        return KeyBases(left) if any(matrices is not None for matrices in left) else None

    @cached_property
    def _bases(self) -> list[Bases | None]:
        exact = [None if layer is None else layer.double() for layer in self.layers]
        return [None if layer is None else Bases(layer.float(), torch.linalg.inv(layer).float()) for layer in exact]

    def to_json(self) -> list[dict[str, Any] | None]:
        """For each layer its numbers in base 64."""
        return [None if x is None else {"fp16": base64.b64encode(x.cpu().numpy().tobytes()).decode()} for x in self.layers]

    @classmethod
    def from_json(cls, content: Sequence[dict[str, Any] | None], shape: CacheShape) -> KeyBases:
        """Raises ValueError for numbers that do not fit the shape of the cache, or cannot be inverted."""
        layers = zip(content, shape.layers, strict=True)
        return cls(tuple(None if found is None else _matrices(found, layer) for found, layer in layers))


def _matrices(content: dict[str, Any], layer: LayerShape) -> Tensor:
    numbers = np.frombuffer(base64.b64decode(content["fp16"], validate=True), dtype=np.float16)
    matrices = torch.from_numpy(numbers.reshape(layer.kv_heads, layer.head_dim, layer.head_dim).copy())
    if not bool(matrices.double().det().abs().gt(0).all()):
        raise ValueError("the bases of keys cannot be inverted")
    return matrices
