"""A conversation as a prompt: what of it is context, what is the question, and what the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from ib_analysis.errors import CalibrationError, IBAnalysisError
from ib_analysis.model.chat import chat_ids

Conversation = Sequence[Mapping[str, Any]]  # messages, as {"role": "user", "content": "Hello"}

ROLES = ("system", "developer", "user", "assistant", "tool")


def split_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation, number: int
) -> tuple[list[int], list[int], list[int] | None]:
    """Token ids (context, question, known answer) of prompt `number`, rendered with the tokenizer's chat template.

    If the last message is the assistant's, it is the known answer; else there is none. The question reaches from the text of the
    last user message to where the answer begins. If it is at least as long as all before it, it holds the context as well, as a
    document and a question in one message do: then everything is context, as in a text, and the question is empty.
    Raises CalibrationError if there are no messages, or none of the user, or if their form is another or the template fails.
    """
    name = f"prompt {number} (chat)"
    _check_messages(messages, name)
    answer = None
    if messages[-1]["role"] == "assistant":
        answer = list(tokenizer(messages[-1].get("content") or "", add_special_tokens=False).input_ids)
        messages = messages[:-1]
    asking = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if asking is None:
        raise CalibrationError(f"{name} has no user message before the answer: add one")
    user = messages[asking]
    # Its text begins where the tokens change with it. To render what comes before it alone is what some templates refuse.
    other = "!" if user["content"].lstrip().startswith("?") else "?"
    changed = [*messages[:asking], {**user, "content": other}, *messages[asking + 1 :]]
    try:
        ids, others = chat_ids(tokenizer, messages), chat_ids(tokenizer, changed)
    except IBAnalysisError as error:
        raise CalibrationError(f"{name}: {error}") from error
    begin = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, others)))
    if 2 * begin <= len(ids):
        begin = len(ids)
    return ids[:begin], ids[begin:], answer


def _check_messages(messages: Conversation, name: str) -> None:
    if not messages:
        raise CalibrationError(f"{name} is a conversation without messages: pass at least one of the user")
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise CalibrationError(f"message {i} of {name} has the role {role!r}: use one of {', '.join(ROLES)}")
        if not isinstance(content, str) and not (role == "assistant" and message.get("tool_calls")):
            raise CalibrationError(f"message {i} of {name} has a content of type {type(content).__name__}: pass a text")
