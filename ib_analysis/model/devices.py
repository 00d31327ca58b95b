"""Where a model computes, if its layers lie on several devices or are fetched when they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes token ids and gives logits.

    Weights that accelerate has put aside, in the CPU's memory or on a disk, are on "meta" between two passes: they are read on
    the first device that the model was given, as accelerate does.
    """
    if model.device.type != "meta":
        return model.device
    computing = [place for place in model.hf_device_map.values() if place not in ("cpu", "disk")]
    return torch.device(computing[0] if computing else "cpu")


def is_dispatched(model: torch.nn.Module) -> bool:
    """Whether accelerate moves weights or hidden states while the model reads."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def stored_parameters(model: torch.nn.Module) -> Iterator[Tensor]:
    """Every parameter once, with its values, those that accelerate has put aside, too."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                hook: Any = getattr(module, "_hf_hook", None)
                yield from _parts(hook.weights_map[name] if parameter.is_meta else parameter)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a quantized weight consists of, as PyTorch has its subclasses tell them; a plain tensor is one."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor
