"""Every task's prompts: long enough, answerable from the context, scored against the right chance, and the same every time."""

import re
from collections import Counter
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ib_analysis.errors import CalibrationError
from ib_analysis.tasks import TASKS
from ib_analysis.tasks.mixture import MIXTURE, mixture
from ib_analysis.tasks.retrieval import pairs_prompt
from ib_analysis.tasks.text import embedded_tokenizer, held_out_documents
from ib_analysis.tasks.words import ADJECTIVES, NOUNS, PLACES, VERBS, WORDS, count_words, scatter

SEEDS = st.integers(0, 10**9)
LENGTHS = st.integers(128, 1023)
WRITTEN = [name for name in TASKS if name != "text"]  # by a generator, word by word
FILLER_WORDS = 10  # of a filler sentence, with its stop and line end

quick = settings(max_examples=40, deadline=None)


def token_ids(text: str) -> list[int]:
    return embedded_tokenizer().encode(text, add_special_tokens=False).ids


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@quick
@given(seed=SEEDS, length=LENGTHS)
def test_same_seed_same_prompt(task, seed, length):
    prompt = TASKS[task](Random(seed), length)
    assert prompt == TASKS[task](Random(seed), length)
    assert prompt != TASKS[task](Random(seed + 1), length)
    assert prompt.task == task


@pytest.mark.parametrize("task", WRITTEN)
@quick
@given(seed=SEEDS, length=LENGTHS)
def test_length_and_depth(task, seed, length):
    prompt = TASKS[task](Random(seed), length)
    assert length - FILLER_WORDS - 2 <= count_words(prompt.text) <= length
    assert 0 <= prompt.depth_share < 1
    assert prompt.text.startswith(prompt.context) and prompt.text.endswith(prompt.turns[-1][1])


@pytest.mark.parametrize("task", WRITTEN)
@quick
@given(seed=SEEDS, length=LENGTHS)
def test_words_are_tokens_and_parts_are_encoded_alike_apart(task, seed, length):
    prompt = TASKS[task](Random(seed), length)
    parts = [prompt.context, *(text for turn in prompt.turns for text in turn)]
    assert [token for part in parts for token in token_ids(part)] == token_ids(prompt.text)
    assert len(token_ids(prompt.text)) == count_words(prompt.text)
    assert embedded_tokenizer().decode(token_ids(prompt.text), skip_special_tokens=False) == prompt.text
    for _, answer in prompt.turns:
        words = answer.split()
        assert len(token_ids(answer)) == len(words) + 1  # and the line end
        assert token_ids(answer)[0] == token_ids(f" {words[0]}")[0]


@pytest.mark.parametrize("task", ["retrieval", "needles"])
@quick
@given(seed=SEEDS, length=LENGTHS)
def test_pairs_hold_the_answers(task, seed, length):
    prompt = TASKS[task](Random(seed), length)
    pairs = dict(re.findall(r"^- (\w+) (\w+)$", prompt.context, re.MULTILINE))
    assert len({*pairs, *pairs.values()}) == 2 * len(pairs)  # no word twice
    assert 8 <= len(pairs) <= 24 and prompt.chance == 1 / len(pairs)
    asked = [question.removeprefix("Find ") for question, _ in prompt.turns]
    assert [answer for _, answer in prompt.turns] == [f" {pairs[key]}\n" for key in asked]
    assert len(set(asked)) == len(asked) == {"retrieval": 1, "needles": 3}[task]
    before = prompt.context[: prompt.context.index(f"- {asked[0]} ")]
    assert prompt.depth_share == count_words(before) / count_words(prompt.context)


@quick
@given(seed=SEEDS, length=LENGTHS)
def test_copying_repeats_the_list(seed, length):
    prompt = TASKS["copying"](Random(seed), length)
    (listed,) = re.findall(r"^List:(.*\n)", prompt.context, re.MULTILINE)
    words = listed.split()
    assert (prompt.question, prompt.answer) == ("List:", listed)
    assert len(set(words)) == len(words) and prompt.chance == 1 / len(words)
    assert 8 <= len(words) <= 48


@quick
@given(seed=SEEDS, length=LENGTHS)
def test_frequency_asks_for_the_most_votes(seed, length):
    prompt = TASKS["frequency"](Random(seed), length)
    votes = Counter(" ".join(re.findall(r"^Votes:(.*)$", prompt.context, re.MULTILINE)).split())
    (winner, most), (_, second) = votes.most_common(2)
    assert prompt.turns == (("Most votes:", f" {winner}\n"),)
    assert most >= 1.5 * second and most >= 4
    assert 4 <= len(votes) <= 8 and prompt.chance == 1 / len(votes)


@quick
@given(seed=SEEDS, length=st.integers(80, 800), pairs=st.integers(1, 8), data=st.data())
def test_any_number_of_pairs_and_questions(seed, length, pairs, data):
    questions = data.draw(st.integers(1, pairs))
    prompt = pairs_prompt(Random(seed), length, pairs, questions, "pairs")
    assert prompt.context.count("- ") == pairs and len(prompt.turns) == questions
    assert count_words(prompt.text) <= length


@pytest.mark.slow
@quick
@given(seed=SEEDS, length=st.integers(64, 1023))
@example(seed=1076, length=64)  # the last word has more tokens than an answer may have
def test_text_is_a_held_out_excerpt(seed, length):
    prompt = TASKS["text"](Random(seed), length)
    assert any(prompt.text in document for document in held_out_documents())
    parts = [token_ids(prompt.context), token_ids(prompt.answer)]
    assert parts[0] + parts[1] == token_ids(prompt.text)
    assert length - 16 <= len(token_ids(prompt.text)) <= length
    assert prompt.question == ""
    assert 0 < len(parts[1]) <= min(64, length // 8)


def test_too_long_a_text_is_refused():
    with pytest.raises(CalibrationError, match="ask for at most"):
        TASKS["text"](Random(0), 10**6)


@quick
@given(
    seed=SEEDS, length=st.integers(0, 300), lines=st.lists(st.sampled_from(["- a b\n", "List: c d e\n"]), min_size=1, max_size=6)
)
def test_scatter_keeps_the_lines_in_order(seed, length, lines):
    text = scatter(Random(seed), lines, length)
    assert [line for line in text.splitlines(keepends=True) if not line.startswith("The ")] == lines
    own = sum(map(count_words, lines))
    assert own <= count_words(text) <= max(own, length)
    assert count_words(text) > length - FILLER_WORDS - 2


def test_needles_lie_anywhere():
    shares = sorted(TASKS["retrieval"](Random(seed), 512).depth_share for seed in range(200))
    assert shares[10] < 0.15 and 0.35 < shares[100] < 0.65 and shares[190] > 0.8


def test_mixture_takes_the_tasks_in_turn():
    prompts = mixture("one", 7, 256)
    assert [prompt.task for prompt in prompts] == [*MIXTURE, "retrieval", "needles"]
    assert prompts == mixture("one", 7, 256)
    assert not set(prompts) & set(mixture("two", 7, 256))
    assert [prompt.task for prompt in mixture("one", 3, 256, ["text", "copying"])] == ["text", "copying", "text"]


def test_the_default_mixture_is_all_of_ours():
    assert tuple(TASKS) == MIXTURE


def test_every_word_is_one_token():
    words = (*WORDS, *ADJECTIVES, *NOUNS, *VERBS, *PLACES)
    assert len(set(WORDS)) == len(WORDS)
    assert [word for word in words if len(token_ids(f" {word}")) != 1] == []
