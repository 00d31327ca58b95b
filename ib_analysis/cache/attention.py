"""The one seam into transformers: an attention function that a cache layer can answer instead of tensors.

A layer's `update` may return itself in place of keys and values. The attention function, which sees the rotated queries,
then asks it for the output. Everything else is computed as transformers' own SDPA does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from ib_kernels import partial_attention
from ib_kernels.attention import merge
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ib_analysis.errors import UnsupportedModelError

NAME = "ib_analysis"


def cache_argument(model: PreTrainedModel, cache: Cache) -> dict[str, Any]:
    """The cache as keyword arguments: `model.generate(**inputs, **cache_argument(model, cache))`, as `model(...)` takes them.

    It is called `cache` in newer versions of transformers, `past_key_values` in older ones. With it goes use_cache=True: some
    configs say otherwise, and what reads the whole text at every step would then be given a cache as well.
    """
    return {_cache_name(type(model).forward): cache, "use_cache": True}


@lru_cache
def _cache_name(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


class AnsweringLayer:
    """A cache layer that computes attention over what it holds."""

    def attend(
        self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, scaling: float, extras: dict[str, Any]
    ) -> Tensor:
        """Output [B, H, M, D] for rotated queries [B, H, M, D]; mask bool [B, 1, M, T] or None if all is causal.

        `extras` are the arguments that a model's attention adds: "softcap" (Gemma 2), "s_aux" (gpt-oss).
        """
        raise NotImplementedError

    @property
    def shape(self) -> Any:
        """What every other attention function asks of keys first."""
        raise UnsupportedModelError(
            "a compressed cache was given to a model that does not use the attention function of ib_analysis: "
            "call allocation.cache(model) for this very model, and do not change its attention function afterwards"
        )


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | AnsweringLayer,
    value: Tensor | AnsweringLayer,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What is registered with transformers. Returns ([B, M, H, D], None)."""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if isinstance(key, AnsweringLayer):
        out = key.attend(module, query, attention_mask, scaling, kwargs)
    else:
        assert isinstance(value, Tensor)
        out = full_attention(module, query, key, value, attention_mask, scaling, kwargs, dropout)
    return out.transpose(1, 2).contiguous(), None


def full_attention(
    module: torch.nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    extras: dict[str, Any],
    dropout: float = 0.0,
) -> Tensor:
    """Attention over plain keys and values [B, H_kv, T, D]: output [B, H, M, D]."""
    if extras.get("softcap") is None and extras.get("s_aux") is None:
        out, _ = sdpa_attention_forward(
            module, query, keys, values, mask, scaling=scaling, dropout=dropout, is_causal=extras.get("is_causal")
        )
        return out.transpose(1, 2)
    if mask is None:
        mask = causal_mask(query.shape[2], keys.shape[2], query.device)
    out, lse = grouped_attention(query, keys, values, mask, scaling, extras)
    return finish([out], [lse], query, extras)


def causal_mask(queries: int, tokens: int, device: torch.device) -> Tensor:
    """Bool [1, 1, queries, tokens]: the queries are the last positions."""
    position = torch.arange(tokens, device=device)
    return (position <= position[tokens - queries :, None])[None, None]


def grouped_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float, extras: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Attention of query heads [B, H, M, D] to their KV heads [B, H_kv, T, D] under mask [B or 1, 1, M, T].

    Returns (out fp32 [B * H_kv, G * M, D], log-sum-exp [B * H_kv, G * M]).
    """
    batch, kv_heads, _, head_dim = keys.shape
    groups = query.shape[1] // kv_heads
    rows = query.reshape(batch * kv_heads, -1, head_dim)  # [P, G * M, D]
    visible = mask.expand(batch, kv_heads, -1, -1).repeat(1, 1, groups, 1).flatten(0, 1)  # [P, G * M, T]
    return partial_attention(rows, keys.flatten(0, 1), values.flatten(0, 1), visible, scaling, extras.get("softcap"))


def finish(outs: list[Tensor], lses: list[Tensor], query: Tensor, extras: dict[str, Any]) -> Tensor:
    """Merge parts [P, G * M, D], with a learnt sink if the model has one, to the output [B, H, M, D]."""
    batch, heads, length, head_dim = query.shape
    if extras.get("s_aux") is not None:
        sink = extras["s_aux"].float()[None, :, None].expand(batch, heads, length)  # [B, H, M], a logit without a value
        lses = [*lses, sink.reshape(lses[0].shape)]
        outs = [*outs, torch.zeros_like(outs[0])]
    out, _ = merge(outs, lses)
    return out.reshape(batch, heads, length, head_dim).to(query.dtype)


def use_attention(model: PreTrainedModel) -> None:
    """Switch `model` to this attention function for good. Without a cache of ours it computes what SDPA does.

    Raises UnsupportedModelError if the model does not use transformers' attention interface.
    """
    if model.config._attn_implementation == model.config.get_text_config(decoder=True)._attn_implementation == NAME:
        return
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not take its attention function from transformers' AttentionInterface, "
            "so its cache cannot be compressed: use a model that does (Llama, Mistral, Qwen, Gemma, ...)"
        )


@dataclass
class _Loan:
    """A model that is borrowed: its attention functions before, and by whom."""

    before: list[tuple[PreTrainedConfig, Any]]
    borrowers: set[object]


_LOANS: WeakKeyDictionary[PreTrainedModel, _Loan] = WeakKeyDictionary()
_LENDING = RLock()


@contextmanager
def borrowed(model: PreTrainedModel) -> Iterator[None]:
    """The model with this attention function, until the end of the block, however it ends.

    Several threads may borrow it at a time, and in each other's blocks: the last one to end gives it back.
    """
    borrower = object()
    try:
        with _LENDING:
            if model not in _LOANS:
                _LOANS[model] = _Loan([(config, config._attn_implementation) for config in _configs(model)], set())
            _LOANS[model].borrowers.add(borrower)
            use_attention(model)
        yield
    finally:
        with _LENDING:
            _give_back(model, borrower)


def _give_back(model: PreTrainedModel, borrower: object) -> None:
    """Ends one loan; an interrupt may have come before it began, or when it had ended."""
    loan = _LOANS.get(model)
    if loan is None:
        return
    loan.borrowers.discard(borrower)
    if not loan.borrowers:
        for config, implementation in loan.before:
            config._attn_implementation = {"": implementation}  # which passes on to configs within it what they have
        del _LOANS[model]


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config that names an attention function: the model's, those of models in it, and behind each those within it."""
    found = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in found:  # which grows
        parts = [getattr(config, name, None) for name in config.sub_configs]
        found += [part for part in parts if part is not None]
    return found


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
