"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): the most recent tokens; its sinks are kept by the cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def streaming_llm(module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> Tensor:
    """The position itself (see `Scorer`)."""
    position = torch.arange(keys.shape[2], device=keys.device, dtype=torch.float32)
    return position.expand(keys.shape[:3])
