"""The model card: its figures are those of the weights that ship, measured again with fewer prompts."""

import re

import numpy as np
import pytest
import yaml
from evaluate import (
    ANSWERED,
    EVICTION_LENGTH_TOKENS,
    LENGTHS_TOKENS,
    held_out_texts,
    model_bits,
    prompts_of,
    right_after_evictions,
    scores,
    weights_checksum,
)
from train import SETTINGS
from transformers import AutoTokenizer

from ib_analysis.model.bundled import BEGIN, CARD, END, MODEL, measured, with_measured

pytestmark = pytest.mark.slow

PROMPTS = 48
STANDARD_ERRORS = 4  # between this measurement and the card's
MIN_FIRST_RIGHT = {"retrieval": 0.9, "needles": 0.85, "copying": 0.8}
MAX_TEXT_BITS_PER_TOKEN = 3.3


@pytest.fixture(scope="module")
def card() -> str:
    return CARD.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows(card) -> dict[str, list[str]]:
    """Cells of the measured tables by the first cell of their row; the accuracy table's by task and length."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in measured(card).splitlines() if line[:1] == "|"]
    return {" ".join(row[:2]) if row[0] in ANSWERED else row[0]: row for row in cells}


def assert_close(share: float, stated: float, prompts: int) -> None:
    """Whether a share of a few prompts right may come from a model whose share of many is `stated`."""
    spread = np.sqrt(max(stated * (1 - stated), 1 / prompts) / prompts)
    assert abs(share - stated) <= STANDARD_ERRORS * spread, (share, stated)


def test_figures_are_of_these_weights(card):
    assert f"`{weights_checksum(MODEL)}`" in measured(card), "run python data/training/evaluate.py --write"


@pytest.mark.parametrize("task", ANSWERED)
def test_accuracy(embedded, rows, task):
    model, tokenizer = embedded
    found = scores(model, tokenizer, prompts_of(task, 512, PROMPTS))
    first = float(np.mean([score.first_right for score in found]))
    assert first >= MIN_FIRST_RIGHT.get(task, 0)
    assert first >= 1.5 * np.mean([score.prompt.chance for score in found])
    stated = rows[f"{task} 512"]
    assert_close(first, float(stated[3].split()[0]), PROMPTS)
    assert_close(float(np.mean([score.whole_right for score in found])), float(stated[4]), PROMPTS)


def test_eviction(embedded, rows):
    """Answers come from the line asked for and what is behind it, and from nowhere else."""
    model, tokenizer = embedded
    found = right_after_evictions(model, tokenizer, prompts_of("retrieval", EVICTION_LENGTH_TOKENS, PROMPTS))
    share = {name: float(np.mean(right)) for name, right in found.items()}
    for name in found:
        assert_close(share[name], float(rows[name][1].split()[0]), PROMPTS)
    assert share["nothing"] >= 0.9 and share["as many tokens in one piece elsewhere"] >= 0.85
    assert share["that line and the 128 tokens behind it"] <= 0.5
    assert share["that line and all behind it"] <= 0.15
    assert share["the line, as soon as it is read"] <= 0.25


def test_natural_text(embedded, rows):
    model, tokenizer = embedded
    texts = held_out_texts()
    bits = model_bits(model, tokenizer(texts, add_special_tokens=False, verbose=False).input_ids, model.config.bos_token_id)
    assert bits.mean() == pytest.approx(float(rows["this model"][1]), abs=0.01)
    assert bits.sum() / sum(len(text.encode()) for text in texts) == pytest.approx(float(rows["this model"][2]), abs=0.01)
    assert bits.mean() < MAX_TEXT_BITS_PER_TOKEN
    assert bits.mean() + 1 < float(rows["Kneser-Ney 5-gram"][1]) < float(rows["unigram"][1])


def test_the_card_has_every_cell(rows):
    for task in ANSWERED:
        for length in LENGTHS_TOKENS:
            chance, stated, low, high = map(float, re.findall(r"\d\.\d{3}", " ".join(rows[f"{task} {length}"][2:4])))
            assert chance < low <= stated <= high


def test_front_matter(card):
    _, front, text = card.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["license"] == "apache-2.0" and fields["language"] == "en" and fields["library_name"] == "transformers"
    assert text.lstrip().startswith("# ")


def test_the_example_finds_the_word(card, capsys):
    exec(card.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.strip() == "violet"


def test_stated_sizes(card, embedded):
    model, _ = embedded
    assert f"{sum(weights.numel() for weights in model.parameters()):,}" in card
    assert f"{len(AutoTokenizer.from_pretrained(MODEL)):,} byte-level" in card
    config = model.config
    cache_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert f"{cache_bytes:,} bytes a token" in card


def test_stated_training(card):
    stages = [stage for name in ("first", "second") for stage in SETTINGS[name].stages]
    tokens = [stage.steps * stage.rows * stage.length for stage in stages]
    for number in (*tokens, sum(tokens)):
        assert f"{number:,}" in card


def test_other_figures_change_nothing_else(card):
    changed = with_measured(card, "new\n")
    assert measured(changed) == "new\n"
    assert with_measured(changed, measured(card)) == card
    assert card.count(BEGIN) == card.count(END) == 1
