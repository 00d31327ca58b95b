"""Whether `generate` reads from the cache that it was given."""

from __future__ import annotations

import warnings

import torch
from transformers import DynamicCache, PreTrainedModel

from ib_analysis.cache.attention import cache_argument
from ib_analysis.model.devices import input_device


def warn_if_lost(model: PreTrainedModel) -> None:
    """Warns, with the length, if `generate` would go on without the cache from some length on."""
    length = lost_at(model)
    if length is not None:
        warnings.warn(
            f"generate of {type(model).__name__} drops a cache of up to {length - 1} tokens when the text reaches {length}, and "
            f"reads all of it into a full one of its own: keep prompt and answer below {length} tokens, or call "
            f"cache.fill(model, input_ids[:, :-1]) for a prompt of more than {length}; cache.check_used says afterwards whether "
            "it was read",
            stacklevel=3,
        )


def lost_at(model: PreTrainedModel) -> int | None:
    """The number of tokens at which `generate` would hand over another cache than it was given; None if it never does.

    The model's own preparation of inputs is asked: at two tokens, and where its positions change from short to long factors.
    """
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    text = model.config.get_text_config(decoder=True)
    switch, last = (getattr(text, f"{name}max_position_embeddings", None) for name in ("original_", ""))
    lengths = [2] if switch is None or last is None or switch >= last else [2, switch + 1]
    return next((length for length in lengths if _is_lost(model, length)), None)


def _is_lost(model: PreTrainedModel, length: int) -> bool:
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, length, dtype=torch.int64, device=input_device(model))
    given = cache_argument(model, cache)
    try:
        inputs = model.prepare_inputs_for_generation(ids, **given, attention_mask=torch.ones_like(ids))
    except Exception:  # code from elsewhere may ask for more: then nothing is known
        return False
    return all(found is not cache for found in inputs.values())
