"""Text from a model, with the full cache or a compressed one."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.cache.attention import cache_argument
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.errors import IBAnalysisError
from ib_analysis.files import check_unicode
from ib_analysis.model.chat import chat_ids
from ib_analysis.model.devices import input_device


@torch.no_grad()
def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    tokens: int,
    cache: CompressedCache | None = None,
    *,
    chat: bool = False,
) -> str:
    """The greedy continuation of `text`, up to `tokens` tokens, with the full cache if none is given.

    With `chat` the text is a user's message in the tokenizer's chat template, and its continuation the answer. The cache is
    filled, and compressed, before the last token of the prompt is read: so no prediction comes from the uncompressed prefill.
    Raises IBAnalysisError for fewer than one token, for a prompt too short to compress, and for `chat` without a template.
    """
    if tokens < 1:
        raise IBAnalysisError(f"cannot generate {tokens} tokens: ask for at least one")
    check_unicode(text, "the prompt")
    prompt = chat_ids(tokenizer, [{"role": "user", "content": text}]) if chat else tokenizer(text).input_ids
    ids = torch.tensor([prompt], dtype=torch.int64, device=input_device(model))  # [1, T]
    if ids.shape[1] < 2:
        raise IBAnalysisError("the prompt has fewer than two tokens: there is nothing to compress")
    filled = cache_argument(model, DynamicCache(config=model.config) if cache is None else cache)
    if cache is None:
        model(ids[:, :-1], logits_to_keep=1, **filled)
    else:
        cache.fill(model, ids[:, :-1])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **filled)
    if cache is not None:
        cache.check_used(out.shape[1] - 1)
    continuation: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=chat)
    return continuation
