"""How does a chat model read a conversation? As its tokenizer's chat template writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ib_analysis.errors import IBAnalysisError


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a conversation, up to where the assistant's next message begins.

    Raises IBAnalysisError if the tokenizer has no chat template, or if the template does not take these messages.
    """
    if not tokenizer.chat_template:
        raise IBAnalysisError("the tokenizer has no chat template: pass text as the model should read it, or use a chat model")
    try:
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    except Exception as error:  # a template is a program, which may raise anything
        reason = str(error).partition("\n")[0]
        raise IBAnalysisError(f"the chat template does not take these messages: {reason} ({type(error).__name__})") from error
    return list(ids)
