"""What a long answer loses: the tokens that it adds leave the windows of the cache, and are compressed, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.cache.attention import borrowed, cache_argument
from ib_analysis.cache.compressed import CompressedCache
from ib_analysis.errors import CalibrationError
from ib_analysis.files import check_unicode
from ib_analysis.model.devices import input_device
from ib_analysis.replay.measurement import bootstrap_interval
from ib_analysis.search.allocation import Allocation
from ib_analysis.tasks.mixture import mixture

TOKENS = 128
TEXTS = 32
MARGIN = 32  # tokens by which a text of ours may be shorter than was asked for, as it ends with a word
BATCH = 8  # sequences that are read together


def answer_losses(
    model: PreTrainedModel,
    allocation: Allocation,
    texts: Sequence[str | Tensor] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    context_length: int | None = None,
    tokens: int = TOKENS,
) -> pd.DataFrame:
    """One row for each part of an answer, the first 32 tokens, the next 32, the next 64 and so on. The model is left as it was.

    A text's own words are the answer: its first `context_length` tokens are read and compressed, the next `tokens` are then read
    one by one from the compressed cache. Columns: first_token, last_token, counted from 1; kl_bits = E KL(full || compressed) in
    bits per predicted token with its 95% interval low_bits, high_bits; texts.

    Args:
        texts: each a text, which needs a tokenizer, or a 1-D tensor of token ids; longer ones are cut. By default 32 of our own.
        context_length: by default the allocation's.

    Raises CalibrationError for texts that are too short, ProfileMismatchError for the allocation of another model.
    """
    allocation.check_model(model)
    context = allocation.context_length if context_length is None else context_length
    for name, number in (("tokens", tokens), ("context_length", context)):
        if not isinstance(number, Integral) or isinstance(number, bool) or number < 1:
            raise CalibrationError(f"{name} is a whole number of at least 1, not {number!r}")
    length = int(context + tokens) + 1
    if texts is None:
        texts = [prompt.text for prompt in mixture("answers", TEXTS, length + MARGIN, ("text",))]
    rows = _token_rows(texts, tokenizer, length).to(input_device(model))
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if not bool(((rows >= 0) & (rows < vocabulary)).all()):
        raise CalibrationError(
            f"texts have tokens outside of the model's vocabulary, 0 to {vocabulary - 1}: use its own tokenizer"
        )
    try:
        with borrowed(model):
            found = [_losses(model, allocation, batch, int(context)) for batch in rows.split(BATCH)]
    except IndexError as error:  # of an embedding: all tokens are in the vocabulary, so it is that of positions
        raise CalibrationError(f"the model has fewer than {length - 1} positions: ask for fewer tokens") from error
    kl_bits = np.concatenate(found)  # [texts, tokens]
    table = []
    for first, last in _parts(tokens):
        losses = kl_bits[:, first:last].mean(1)
        low, high = bootstrap_interval(losses)
        table.append((first + 1, last, float(losses.mean()), low, high, len(losses)))
    return pd.DataFrame(table, columns=["first_token", "last_token", "kl_bits", "low_bits", "high_bits", "texts"])


def _parts(tokens: int) -> list[tuple[int, int]]:
    edges = [0]
    while edges[-1] < tokens:
        edges.append(min(tokens, max(32, 2 * edges[-1])))
    return list(zip(edges, edges[1:]))


def _token_rows(texts: Sequence[str | Tensor], tokenizer: PreTrainedTokenizerBase | None, length: int) -> Tensor:
    """The first `length` tokens of each: int64 [texts, length]."""
    if isinstance(texts, str) or not hasattr(texts, "__len__") or len(texts) == 0:
        raise CalibrationError("texts is a list of at least one")
    rows = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise CalibrationError(f"text {number} needs a tokenizer: pass tokenizer=, or tensors of token ids")
            check_unicode(text, f"text {number}")
            text = torch.tensor(tokenizer(text).input_ids, dtype=torch.int64)
        if not isinstance(text, Tensor) or text.ndim != 1 or text.is_floating_point() or text.dtype == torch.bool:
            raise CalibrationError(f"text {number} is a {type(text).__name__}: pass texts, or 1-D tensors of token ids")
        if len(text) < length:
            raise CalibrationError(
                f"text {number} has {len(text)} tokens, but the context that the allocation is for and the answer take {length}: "
                "pass longer texts"
            )
        rows.append(text[:length].to("cpu", torch.int64))
    return torch.stack(rows)


@torch.no_grad()
def _losses(model: PreTrainedModel, allocation: Allocation, ids: Tensor, context: int) -> NDArray[np.float64]:
    """KL in bits after each token of the answers that ids [B, context + tokens + 1] end with: [B, tokens]."""
    caches = DynamicCache(config=model.config), CompressedCache(allocation.spec, allocation.plans)
    model(ids[:, :context], **cache_argument(model, caches[0]), logits_to_keep=1)
    caches[1].fill(model, ids[:, :context])
    rows = []
    for token in tqdm(ids[:, context:-1].split(1, dim=1), desc="answers", leave=False):
        full, found = (model(token, **cache_argument(model, cache)).logits[:, -1].float().log_softmax(-1) for cache in caches)
        rows.append((full.exp() * (full - found)).sum(-1).clamp(min=0).double().cpu() / math.log(2))
    return torch.stack(rows, 1).numpy()


def answers_text(table: pd.DataFrame) -> str:
    """`answer_losses` as Markdown."""
    rows = []
    for first, last, kl_bits, low, high in table.iloc[:, :5].itertuples(index=False):
        interval = "" if math.isnan(low) else f" [{low:.4f}, {high:.4f}]"
        rows.append(f"| {first} to {last} | {kl_bits:.4f}{interval} |")
    return "\n".join(["| tokens of the answer | loss in bits |", "|---|---:|", *rows])
