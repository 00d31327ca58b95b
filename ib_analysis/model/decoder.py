"""The layers of a model's decoder."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel, count: int) -> list[nn.Module] | None:
    """The model's layers, if there are so many and each takes hidden states first; else None."""
    lists = (list(module) for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    found = next((layers for layers in lists if len(layers) == count), [])
    takes_states = [next(iter(inspect.signature(layer.forward).parameters), "") == "hidden_states" for layer in found]
    return found if found and all(takes_states) else None
