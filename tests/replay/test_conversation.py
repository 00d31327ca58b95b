"""What of a conversation is context, what is the question, and what the answer."""

from copy import deepcopy

import pytest

from ib_analysis.errors import CalibrationError
from ib_analysis.replay.conversation import split_conversation

TEMPLATE = (
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "<s>{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
DOCUMENT = "The farmer sold the red apple to the old sailor. " * 8


def say(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def tokenizer(embedded):
    chatting = deepcopy(embedded[1])
    chatting.chat_template = TEMPLATE
    return chatting


def whole(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("question", ["Who bought it?", "?", "?? And who?", "! Who?", "\n Who?", ""])
def test_the_last_user_message_is_the_question(tokenizer, question):
    messages = [say("user", DOCUMENT), say("assistant", "I see."), say("user", question)]
    context, asked, answer = split_conversation(tokenizer, messages, 0)
    assert context + asked == whole(tokenizer, messages)
    assert answer is None
    before, after = tokenizer.decode(context), tokenizer.decode(asked)
    assert before.endswith("I see.</s>\n<user>\n")
    assert after == f"{question.strip()}</s>\n<assistant>\n"


def test_a_system_message_can_be_the_context(tokenizer):
    context, question, _ = split_conversation(tokenizer, [say("system", DOCUMENT), say("user", "Who bought it?")], 0)
    assert tokenizer.decode(context).endswith("</s>\n<user>\n")
    assert tokenizer.decode(question).startswith("Who bought it?")


@pytest.mark.parametrize("before", [[], [say("system", "Be brief.")]])
def test_a_long_message_is_context_as_well(tokenizer, before):
    messages = [*before, say("user", DOCUMENT + "Who bought it?")]
    assert split_conversation(tokenizer, messages, 0) == (whole(tokenizer, messages), [], None)


def test_the_last_word_of_the_assistant_is_the_answer(tokenizer):
    messages = [say("user", DOCUMENT), say("assistant", "I see."), say("user", "Who bought it?")]
    context, question, answer = split_conversation(tokenizer, [*messages, say("assistant", "The old sailor.")], 0)
    assert (context, question) == split_conversation(tokenizer, messages, 0)[:2]
    assert answer == tokenizer("The old sailor.", add_special_tokens=False).input_ids


def test_an_assistant_may_call_tools_instead_of_speaking(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("message['content'] | trim", "message['content'] or message['tool_calls'][0]")
    calls = [{"type": "function", "function": {"name": "search", "arguments": {}}}]
    messages = [say("user", "Who?"), {"role": "assistant", "content": None, "tool_calls": calls}, say("tool", DOCUMENT)]
    context, question, _ = split_conversation(tokenizer, messages, 0)
    assert context == whole(tokenizer, messages) and not question


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "prompt 3 .* without messages"),
        ([say("human", "Who?")], r"message 0 of prompt 3 \(chat\) has the role 'human': use one of system, developer, user"),
        ([say("user", "Who?"), {"from": "gpt", "value": "He"}], r"message 1 of prompt 3 .* has the role None"),
        ([{"role": "user"}], "message 0 of prompt 3 .* content of type NoneType: pass a text"),
        ([say("user", [{"type": "text", "text": "Who?"}])], "message 0 of prompt 3 .* content of type list"),
        ([say("system", "Be brief.")], "prompt 3 .* no user message"),
        ([say("system", "Be brief."), say("assistant", "Yes.")], "prompt 3 .* no user message"),
        ([say("assistant", "Yes?"), say("user", "Who?")], "prompt 3 .* does not take these messages: the user speaks first"),
    ],
)
def test_conversations_that_are_refused(tokenizer, messages, said):
    with pytest.raises(CalibrationError, match=said):
        split_conversation(tokenizer, messages, 3)
