"""Conversations as token ids, with the tokenizer's chat template."""

from copy import deepcopy

import pytest

from ib_analysis.errors import IBAnalysisError
from ib_analysis.model.chat import chat_ids

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is red?"}]


@pytest.fixture
def tokenizer(embedded):
    chatting = deepcopy(embedded[1])
    chatting.chat_template = TEMPLATE
    return chatting


def test_ids_are_those_of_the_rendered_text(tokenizer):
    """As they stand: no second beginning of a sequence, and end tokens are single tokens."""
    text = "<system> Be brief.</s><user> What is red?</s><assistant>"
    ids = chat_ids(tokenizer, MESSAGES)
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.eos_token_id) == 2
    assert chat_ids(tokenizer, tuple(MESSAGES)) == ids


def test_a_tokenizer_without_template(embedded):
    with pytest.raises(IBAnalysisError, match="the tokenizer has no chat template"):
        chat_ids(embedded[1], MESSAGES)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"take these messages: roles must alternate \(TemplateError\)"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{% if %}", "TemplateSyntaxError"),
        ({"rag": TEMPLATE, "tools": TEMPLATE}, "ValueError"),
    ],
)
def test_a_template_that_fails(tokenizer, template, said):
    tokenizer.chat_template = template
    with pytest.raises(IBAnalysisError, match=f"the chat template does not .*{said}") as raised:
        chat_ids(tokenizer, MESSAGES)
    assert "\n" not in str(raised.value)
