"""Text from a model, with the full cache or a compressed one."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.cache.attention import cache_argument
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.errors import IBAnalysisError


@torch.no_grad()
def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    tokens: int,
    cache: CompressedCache | None = None,
) -> str:
    """The greedy continuation of `text`, up to `tokens` tokens, with the full cache if none is given.

    The cache is filled, and compressed, before the last token of the text is read: so no prediction comes from the
    uncompressed prefill.
    """
    if tokens < 1:
        raise IBAnalysisError(f"cannot generate {tokens} tokens: ask for at least one")
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    ids = inputs["input_ids"]
    if ids.shape[1] < 2:
        raise IBAnalysisError("the prompt has fewer than two tokens: there is nothing to compress")
    filled = cache_argument(model, DynamicCache(config=model.config) if cache is None else cache)
    model(ids[:, :-1], logits_to_keep=1, **filled)
    out = model.generate(input_ids=ids, attention_mask=inputs["attention_mask"], max_new_tokens=tokens, do_sample=False, **filled)
    continuation: str = tokenizer.decode(out[0, ids.shape[1] :])
    return continuation
