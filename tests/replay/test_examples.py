"""Prompts become examples: what is compressed, what follows, what is predicted."""

from copy import deepcopy
from random import Random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ib_analysis.errors import CalibrationError
from ib_analysis.replay.examples import Prompts, make_examples
from ib_analysis.tasks import TASKS, Prompt


def test_question_is_prefilled_or_not(embedded):
    model, tokenizer = embedded
    prompt = TASKS["needles"](Random(3), 200)
    context = tokenizer(prompt.context).input_ids
    question = tokenizer(prompt.question, add_special_tokens=False).input_ids
    aware, agnostic = (make_examples(model, tokenizer, [prompt], question_aware=flag)[0] for flag in (True, False))
    assert aware.prefill.tolist() == context + question[:-1]
    assert agnostic.prefill.tolist() == (context + question)[: len(context) - 1] or agnostic.prefill.tolist() == context
    assert torch.equal(torch.cat([aware.prefill, aware.followup]), torch.cat([agnostic.prefill, agnostic.followup]))


def test_answers_follow_the_positions_that_are_asked(embedded):
    model, tokenizer = embedded
    prompt = TASKS["needles"](Random(4), 200)
    example = make_examples(model, tokenizer, [prompt])[0]
    words = [tokenizer.decode([token]) for token in example.answers.tolist()]
    assert words == [answer.rstrip("\n") for _, answer in prompt.turns]
    asking = [tokenizer.decode([example.followup[position]]) for position in example.asked.tolist()]
    assert asking == [f" {question.split()[-1]}" for question, _ in prompt.turns]


def test_sampled_tokens_are_those_of_the_model(embedded):
    """Over many draws, the next token is as frequent as the full model says."""
    model, tokenizer = embedded
    ids = torch.tensor(tokenizer("def open(self, path, mode='r', buffering=-1, encoding=None):").input_ids[:16])
    with torch.no_grad():
        expected = model(ids[None, :14]).logits[0, -1].softmax(-1)
    examples = make_examples(model, None, [ids] * 400)
    drawn = torch.tensor([int(torch.cat([example.prefill, example.followup])[14]) for example in examples])
    frequency = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    error = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((frequency - expected).abs() <= 5 * error + 0.01).all()
    assert len(torch.unique(drawn)) > 1


def test_same_seed_same_examples(embedded):
    model, tokenizer = embedded
    prompts = [TASKS["text"](Random(i), 128) for i in range(3)]
    first, second, other = (make_examples(model, tokenizer, prompts, seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(a.followup, b.followup) for a, b in zip(first, second))
    assert any(not torch.equal(a.followup, b.followup) for a, b in zip(first, other))


def test_texts_and_token_ids_are_split(embedded):
    model, tokenizer = embedded
    ids = torch.arange(3, 163)
    example = make_examples(model, None, [ids])[0]
    assert example.prefill.tolist() == ids[: 160 - 20 - 1].tolist()
    assert len(example.predicting) == 20 and len(example.asked) == 0
    assert make_examples(model, tokenizer, ["word " * 100])[0].task == "text"


MESSAGES = [
    {"role": "user", "content": "The farmer sold the red apple to the old sailor. " * 8},
    {"role": "assistant", "content": "I see."},
    {"role": "user", "content": "Who bought it?"},
]


@pytest.fixture
def chatting(embedded):
    """The embedded model, with a tokenizer that has a chat template."""
    tokenizer = deepcopy(embedded[1])
    tokenizer.chat_template = (
        "<s>{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    return embedded[0], tokenizer


def test_conversations_are_rendered_with_the_chat_template(chatting):
    model, tokenizer = chatting
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    aware, agnostic = (make_examples(model, tokenizer, [MESSAGES], question_aware=flag)[0] for flag in (True, False))
    assert aware.task == "chat" and len(aware.asked) == 0
    assert aware.prefill.tolist() == ids[:-1]
    assert tokenizer.decode(agnostic.prefill).endswith("I see.</s>\n<user>\n")
    for example in (aware, agnostic):
        everything = torch.cat([example.prefill, example.followup]).tolist()
        assert everything[: len(ids)] == ids
        assert (example.predicting + len(example.prefill)).tolist() == list(range(len(ids) - 1, len(everything)))
        assert 1 <= len(example.predicting) <= 32


def test_a_long_message_alone_is_compressed_whole(chatting):
    model, tokenizer = chatting
    aware, agnostic = (make_examples(model, tokenizer, [MESSAGES[:1]], question_aware=flag)[0] for flag in (True, False))
    assert torch.equal(aware.prefill, agnostic.prefill)
    assert len(aware.followup) == len(aware.predicting)


def test_the_last_word_of_the_assistant_gives_way_to_the_model(chatting):
    model, tokenizer = chatting
    short, long = ([*MESSAGES, {"role": "assistant", "content": text}] for text in ("The sailor.", "The old sailor. " * 30))
    tokens = len(tokenizer("The sailor.", add_special_tokens=False).input_ids)
    examples = make_examples(model, tokenizer, [short, long, MESSAGES])
    assert all(torch.equal(example.prefill, examples[0].prefill) for example in examples)
    assert 1 <= len(examples[0].predicting) <= tokens
    assert max(len(example.predicting) for example in examples) <= 32


@pytest.mark.parametrize(("ends", "tokens"), [(None, 32), (2040, 32), (list(range(2040)), 1)])
def test_an_answer_ends_where_generate_stops(chatting, ends, tokens):
    model, tokenizer = deepcopy(chatting[0]), chatting[1]
    model.generation_config.eos_token_id = ends
    chat, text = make_examples(model, tokenizer, [MESSAGES, torch.arange(3, 163)])
    assert len(chat.predicting) == tokens
    assert len(chat.followup) == tokens  # the last prompt token, and all sampled ones but the last
    assert len(text.predicting) == 20


def test_conversations_and_other_prompts_together(chatting):
    model, tokenizer = chatting
    prompts: Prompts = [MESSAGES, "The farmer sold the red apple. " * 9, torch.arange(3, 163), TASKS["needles"](Random(3), 200)]
    assert [example.task for example in make_examples(model, tokenizer, prompts)] == ["chat", "text", "text", "needles"]


@pytest.mark.parametrize("prompts", [MESSAGES, [{"messages": MESSAGES}]])
def test_one_conversation_is_no_list_of_conversations(chatting, prompts):
    model, tokenizer = chatting
    with pytest.raises(CalibrationError, match="prompt 0 is a dict: a conversation is a list of messages"):
        make_examples(model, tokenizer, prompts)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "without messages"),
        ([{"role": "user", "content": 3}], "content of type int"),
        ([*MESSAGES, {"role": "assistant", "content": ""}], "empty answer"),
        (["Who?"], "is list: pass a text, .* or a conversation"),
    ],
)
def test_bad_conversations(chatting, prompt, said):
    model, tokenizer = chatting
    with pytest.raises(CalibrationError, match=f"prompt 1 .*{said}"):
        make_examples(model, tokenizer, [MESSAGES, prompt])


def test_conversations_need_a_chat_template(embedded, small_llama):
    model, tokenizer = embedded
    with pytest.raises(CalibrationError, match=r"prompt 1 .*no chat template"):
        make_examples(model, tokenizer, ["word " * 100, MESSAGES])
    with pytest.raises(CalibrationError, match="no tokenizer"):
        make_examples(small_llama, None, [MESSAGES])


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "no prompts"),
        ([torch.arange(5)], "prompt 0 has 5 tokens"),
        ([torch.arange(30), torch.rand(30)], "prompt 1 is Tensor"),
        ([torch.zeros(2, 30, dtype=torch.long)], "prompt 0 is Tensor"),
        ([3], "prompt 0 is int"),
        (["a text"], "prompt 0 has .* tokens"),
        ([torch.arange(30), torch.full((30,), 99_999)], r"prompt 1 .*token 99999"),
        ([torch.full((30,), -1)], r"prompt 0 .*token -1"),
        ([torch.arange(30).numpy()], r"prompt 0 is ndarray.*torch\.Tensor"),
    ],
)
def test_bad_prompts(embedded, prompts, said):
    with pytest.raises(CalibrationError, match=said):
        make_examples(embedded[0], None, prompts)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (Prompt("x", "a context", ()), "no turns"),
        (Prompt("x", "a context", (("question", "answer"), ("question", ""))), "empty answer in turn 1"),
        (Prompt("x", "", (("question", "answer"),)), "a context of 0 tokens"),
    ],
)
def test_empty_parts(embedded, prompt, said):
    model, tokenizer = embedded
    with pytest.raises(CalibrationError, match=rf"prompt 1 \(x\) has .*{said}"):
        make_examples(model, tokenizer, ["word " * 20, prompt])


HALF = "half an emoji \ud83d " * 20


@pytest.mark.parametrize("prompt", [HALF, Prompt("x", "a context", ((HALF, "answer"),)), [{"role": "user", "content": HALF}]])
def test_what_is_no_valid_unicode_is_named(embedded, prompt):
    model, tokenizer = embedded
    with pytest.raises(CalibrationError, match="prompt 1 is no valid Unicode"):
        make_examples(model, tokenizer, ["word " * 20, prompt])


def test_empty_text(embedded):
    with pytest.raises(CalibrationError, match="prompt 0"):
        make_examples(embedded[0], embedded[1], [""])


def test_a_model_in_training_mode_is_refused(small_llama, small_prompts):
    with pytest.raises(CalibrationError, match=r"call model\.eval\(\)"):
        make_examples(small_llama.train(), None, small_prompts)


def test_a_generator_of_prompts_is_refused(small_llama, small_prompts):
    with pytest.raises(CalibrationError, match="generator, which can be read only once"):
        make_examples(small_llama, None, (prompt for prompt in small_prompts))  # type: ignore[arg-type]


def test_prompts_longer_than_the_positions_of_a_model(small_prompts):
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=120)
    config.bos_token_id = config.eos_token_id = 0
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(CalibrationError, match="no position 120: pass shorter prompts"):
        make_examples(model, None, small_prompts)


def test_texts_for_a_model_without_tokenizer(small_llama):
    with pytest.raises(CalibrationError, match="no tokenizer"):
        make_examples(small_llama, None, ["The farmer sold the red apple to the old sailor. " * 9])


def test_one_text_is_no_list_of_texts(embedded):
    with pytest.raises(CalibrationError, match="a list of texts"):
        make_examples(embedded[0], embedded[1], "The farmer sold the red apple to the old sailor. " * 9)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "7", True])
def test_bad_seeds(embedded, seed):
    model, tokenizer = embedded
    with pytest.raises(CalibrationError, match="whole number"):
        make_examples(model, tokenizer, ["The farmer sold the red apple to the old sailor. " * 9], seed=seed)
