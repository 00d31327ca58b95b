"""Measure the embedded model and print the tables of its card.

python data/training/evaluate.py                # about ten minutes on two cores
python data/training/evaluate.py --write        # into data/README.md as well
python data/training/evaluate.py --model out/second --prompts 40
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import corpus
import numpy as np
import torch
import transformers
from ngrams import grams, kneser_ney, unigram
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis import load
from ib_analysis.cache.attention import cache_argument
from ib_analysis.model.bundled import CARD, HELD_OUT, MODEL, with_measured
from ib_analysis.tasks import TASKS, Prompt

ANSWERED = ("retrieval", "needles", "copying", "frequency")
LENGTHS_TOKENS = (128, 256, 512, 1024)
DEPTH_BINS = 5
EVICTION_LENGTH_TOKENS = 512
NEAR_TOKENS, FAR_TOKENS = 32, 128  # behind the line that holds the answer
BATCH_TOKENS = 8192
WINDOW_TOKENS, STRIDE_TOKENS = 1024, 512
NGRAM_ORDER = 5
SEED = "evaluation"  # training draws from "1 0", "1 1", ...


@dataclass(frozen=True)
class Score:
    """How one prompt was answered, right answers before each token given. Every number is a share of 1."""

    prompt: Prompt
    first_right: float  # of the questions: the first token of the answer
    whole_right: float  # of the questions: all tokens, so that greedy decoding gives the answer
    tokens_right: float  # of the answers' tokens


def prompts_of(task: str, length: int, count: int) -> list[Prompt]:
    """`count` prompts of at most `length` tokens with their answers and the begin token."""
    return [TASKS[task](random.Random(f"{SEED} {task} {length} {i}"), length - 1) for i in range(count)]


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[range]]:
    """All tokens of a prompt, and where the tokens of each answer are."""
    ids = list(tokenizer(prompt.context).input_ids)
    answers = []
    for question, answer in prompt.turns:
        asked, said = (tokenizer(text, add_special_tokens=False).input_ids for text in (question, answer))
        ids += asked + said
        answers.append(range(len(ids) - len(said), len(ids)))
    return ids, answers


def batches(rows: Sequence[list[int]], pad_token: int) -> Iterator[torch.Tensor]:
    """The rows in their order, padded at the end: under a causal mask no row sees its padding. [rows of a batch, longest]."""
    size = max(1, BATCH_TOKENS // max(map(len, rows)))
    for start in range(0, len(rows), size):
        some = [torch.tensor(row) for row in rows[start : start + size]]
        yield torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=pad_token)


@torch.inference_mode()
def scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[Score]:
    """The score of each prompt, all of its answers predicted in one pass."""
    encoded = [encode(prompt, tokenizer) for prompt in prompts]
    predicted: list[torch.Tensor] = []  # of each prompt: the likeliest token at each position but the first
    for batch in batches([ids for ids, _ in encoded], model.config.pad_token_id):
        predicted += model(batch[:, :-1], use_cache=False).logits.argmax(-1)
    found = []
    for prompt, (ids, answers), guesses in zip(prompts, encoded, predicted):
        right = [[int(guesses[place - 1]) == ids[place] for place in answer] for answer in answers]
        found.append(
            Score(
                prompt,
                first_right=float(np.mean([answer[0] for answer in right])),
                whole_right=float(np.mean([all(answer) for answer in right])),
                tokens_right=float(np.mean([one for answer in right for one in answer])),
            )
        )
    return found


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `count` prompts (Wilson, 1927)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


# Eviction and attention


def answer_text(prompt: Prompt) -> str:
    """The line of the context that answers a question about a pair."""
    return f"- {prompt.question.removeprefix('Find ')}{prompt.answer}"


def answer_line(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> range:
    """Where the tokens of that line are in the encoded context."""
    line = answer_text(prompt)
    start = prompt.context.index(line)
    before, through = (len(tokenizer(prompt.context[:end]).input_ids) for end in (start, start + len(line)))
    return range(before, through)


def without(cache: DynamicCache, positions: Sequence[int]) -> DynamicCache:
    """A copy of a cache of one sequence, in which no layer holds the tokens at these positions."""
    keep = torch.ones(cache.get_seq_length(), dtype=torch.bool)
    keep[list(positions)] = False
    smaller = DynamicCache()
    for number, layer in enumerate(cache.layers):
        smaller.update(layer.keys[:, :, keep], layer.values[:, :, keep], number)
    return smaller


def next_token(model: PreTrainedModel, cache: DynamicCache, ids: list[int], position: int) -> int:
    """The likeliest token behind `ids`, which stand from `position` on, whatever the cache has lost before them."""
    positions = torch.arange(position, position + len(ids))[None]
    return int(model(torch.tensor([ids]), **cache_argument(model, cache), position_ids=positions).logits[0, -1].argmax())


def evictions(line: range, context_tokens: int, rng: random.Random) -> dict[str, Sequence[int]]:
    """Positions to evict, by what they are: around the tokens of the line that answers, and as many elsewhere."""
    start, end = line.start, line.stop
    near, far = min(end + NEAR_TOKENS, context_tokens), min(end + FAR_TOKENS, context_tokens)
    size = far - start
    elsewhere = [first for first in range(1, context_tokens - size + 1) if first + size <= start or first >= far]
    first = rng.choice(elsewhere)
    return {
        "nothing": [],
        "the line of the pair asked for": line,
        f"that line and the {NEAR_TOKENS} tokens behind it": range(start, near),
        f"that line and the {FAR_TOKENS} tokens behind it": range(start, far),
        "as many tokens in one piece elsewhere": range(first, first + size),
        "that line and all behind it": range(start, context_tokens),
        f"all but the first token and the last {NEAR_TOKENS}": range(1, context_tokens - NEAR_TOKENS),
    }


@torch.inference_mode()
def right_after_evictions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> dict[str, list[bool]]:
    """Whether the first answer token is right, for each prompt, when tokens leave the cache between context and question."""
    right: dict[str, list[bool]] = {}
    for number, prompt in enumerate(prompts):
        context = tokenizer(prompt.context).input_ids
        asked, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in prompt.turns[0])
        cache = DynamicCache()
        model(torch.tensor([context]), **cache_argument(model, cache), logits_to_keep=1)
        line = answer_line(prompt, tokenizer)
        for name, positions in evictions(line, len(context), random.Random(f"{SEED} evict {number}")).items():
            guess = next_token(model, without(cache, positions), asked, len(context))
            right.setdefault(name, []).append(guess == answer[0])
        other = range(line.start - len(line), line.start) if line.start > len(line) else range(line.stop, line.stop + len(line))
        for name, gone in (("the line, as soon as it is read", line), ("as many tokens next to it, as soon as read", other)):
            cache = read_without(model, context, gone)
            right.setdefault(name, []).append(next_token(model, cache, asked, len(context)) == answer[0])
    return right


def read_without(model: PreTrainedModel, ids: list[int], gone: range) -> DynamicCache:
    """The cache of a text whose tokens `gone` leave it as soon as they are read: no later token sees them."""
    cache = DynamicCache()
    model(torch.tensor([ids[: gone.stop]]), **cache_argument(model, cache), logits_to_keep=1)
    cache = without(cache, gone)
    if gone.stop < len(ids):
        next_token(model, cache, ids[gone.stop :], gone.stop)
    return cache


@torch.inference_mode()
def attention_of_last_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> tuple[NDArray, NDArray]:
    """Of the key asked for: entropy in bits, and share on the line that holds the answer and the 32 tokens behind it.

    Means over the prompts, both [layers, heads].
    """
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")  # which alone returns its weights
    entropies_bits, shares = [], []
    for prompt in prompts:
        ids = tokenizer(prompt.context + prompt.question, return_tensors="pt").input_ids
        line = answer_line(prompt, tokenizer)
        layers = model(ids, output_attentions=True, use_cache=False, logits_to_keep=1).attentions
        weights = torch.stack([layer[0, :, -1] for layer in layers]).double()  # [layers, heads, T]
        entropies_bits.append(-torch.special.xlogy(weights, weights).sum(-1) / math.log(2))
        shares.append(weights[:, :, line.start : line.stop + NEAR_TOKENS].sum(-1))
    model.set_attn_implementation(usual)
    return torch.stack(entropies_bits).mean(0).numpy(), torch.stack(shares).mean(0).numpy()


# Natural text


def held_out_texts() -> list[str]:
    with open(HELD_OUT, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


@torch.inference_mode()
def model_bits(model: PreTrainedModel, documents: Sequence[list[int]], begin_token: int) -> NDArray[np.float64]:
    """Bits of every token of every document, in order. Each is predicted from at least 512 tokens, or all there are."""
    rows, first_scored = [], []
    for document in documents:
        ids = [begin_token, *document]
        for start in range(0, max(1, len(document) - (WINDOW_TOKENS - STRIDE_TOKENS)), STRIDE_TOKENS):
            rows.append(ids[start : start + WINDOW_TOKENS + 1])
            first_scored.append(WINDOW_TOKENS - STRIDE_TOKENS if start else 0)
    found = []
    row = 0
    for batch in batches(rows, model.config.pad_token_id):
        logits = model(batch[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")  # [rows, T]
        for line in losses.double().numpy() / math.log(2):
            found.append(line[first_scored[row] : len(rows[row]) - 1])
            row += 1
    return np.concatenate(found)


def ngram_bits(
    training: Sequence[list[int]], documents: Sequence[list[int]], vocabulary: int, begin_token: int
) -> dict[str, NDArray[np.float64]]:
    """Bits of the same tokens under models that counted the training text."""
    windows = grams(documents, NGRAM_ORDER, begin_token)
    model = kneser_ney(training, vocabulary, NGRAM_ORDER, begin_token)
    return {
        "unigram": -np.log2(unigram(training, vocabulary)[windows[:, -1]]),
        f"Kneser-Ney {NGRAM_ORDER}-gram": -np.log2(model.probability(windows)),
    }


def training_texts() -> list[str] | None:
    """The text that the model was trained on, if this Python's standard library is the one it was taken from."""
    training, held_out = corpus.split()
    return training if held_out == held_out_texts() else None


# The tables


def section(title: str, text: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Title, text and a Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"### {title}\n\n{textwrap.fill(text, 130)}\n\n{table}\n"


def with_interval(share: float, count: int) -> str:
    low, high = wilson(share, count)
    return f"{share:.3f} ({low:.3f} to {high:.3f})"


def accuracy_section(found: dict[tuple[str, int], list[Score]], count: int) -> str:
    rows = []
    for (task, length), cell in found.items():
        chance = np.mean([score.prompt.chance for score in cell])
        first, whole, tokens = np.mean([(score.first_right, score.whole_right, score.tokens_right) for score in cell], axis=0)
        rows.append([task, str(length), f"{chance:.3f}", with_interval(first, count), f"{whole:.3f}", f"{tokens:.3f}"])
    text = (
        f"{count} prompts a line, with the 95% Wilson interval for that many prompts. The right tokens stand before each token "
        "that is predicted. An answer is wholly right if greedy decoding gives it."
    )
    header = ["task", "tokens", "chance", "first token right", "whole answer right", "answer tokens right"]
    return section("Accuracy beside chance", text, header, rows)


def depth_section(found: dict[tuple[str, int], list[Score]]) -> str:
    rows = []
    for length in LENGTHS_TOKENS:
        right: list[list[float]] = [[] for _ in range(DEPTH_BINS + 1)]
        for score in found["retrieval", length]:
            last = score.prompt.context.endswith(answer_text(score.prompt))
            right[DEPTH_BINS if last else int(score.prompt.depth_share * DEPTH_BINS)].append(score.first_right)
        rows.append([str(length), *(f"{np.mean(shares):.3f} of {len(shares)}" if shares else "none" for shares in right)])
    text = (
        "First token right, by where the line of the pair asked for begins: 0 is the start of the context, 1 its end. "
        "Pairs in the very last line are counted apart."
    )
    depths = [f"depth {i / DEPTH_BINS:.1f} to {(i + 1) / DEPTH_BINS:.1f}" for i in range(DEPTH_BINS)]
    return section("Retrieval by depth", text, ["tokens", *depths, "last line"], rows)


def eviction_section(right: dict[str, list[bool]], prompts: Sequence[Prompt]) -> str:
    chance = np.mean([prompt.chance for prompt in prompts])
    text = (
        f"{len(prompts)} retrieval prompts of {EVICTION_LENGTH_TOKENS} tokens, chance {chance:.3f}. The model reads the context, "
        "tokens are removed from every layer's cache, then it reads the question. In the last two lines the tokens are removed "
        "before the context goes on, so that no later token can carry what they said."
    )
    rows = [[name, with_interval(float(np.mean(values)), len(values))] for name, values in right.items()]
    return section("What the cache carries", text, ["evicted", "first token right"], rows)


def attention_section(entropies_bits: NDArray, shares: NDArray) -> str:
    text = (
        "On the same prompts, from the last token (the key asked for): entropy in bits, and in brackets the share on the line "
        f"that holds the answer and the {NEAR_TOKENS} tokens behind it. Even attention to {EVICTION_LENGTH_TOKENS} tokens has "
        f"{math.log2(EVICTION_LENGTH_TOKENS):.0f} bits and a share of {(NEAR_TOKENS + 4) / EVICTION_LENGTH_TOKENS:.0%}."
    )
    rows = [
        [str(layer), *(f"{bits:.2f} ({share:.0%})" for bits, share in zip(*heads))]
        for layer, heads in enumerate(zip(entropies_bits, shares))
    ]
    header = ["layer", *(f"head {head}" for head in range(entropies_bits.shape[1]))]
    return section("Attention of each head", text, header, rows)


def text_section(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    texts, training = held_out_texts(), training_texts()
    begin = model.config.bos_token_id
    documents = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    bits = {"this model": model_bits(model, documents, begin)}
    note = "No n-gram models: the standard library of this Python is not the training text, which is that of Python 3.11.7."
    if training is not None:
        counted = tokenizer(training, add_special_tokens=False, verbose=False).input_ids
        bits |= ngram_bits(counted, documents, len(tokenizer), begin)
        note = "The n-gram models counted the text that the model was trained on."
    text = (
        f"{len(texts)} documents, {len(bits['this model']):,} tokens, the same for every predictor. The model reads windows of "
        f"{WINDOW_TOKENS} tokens, each {STRIDE_TOKENS} after the last; each token counts once, with at least {STRIDE_TOKENS} "
        f"tokens (or all there are) before it. {note}"
    )
    text_bytes = sum(len(one.encode()) for one in texts)
    rows = [[name, f"{values.mean():.3f}", f"{values.sum() / text_bytes:.3f}"] for name, values in bits.items()]
    return section("Natural text that was held out", text, ["predictor", "bits per token", "bits per byte"], rows)


def sections(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """All tables, from `count` prompts for each task and length."""
    cells = [(task, length) for task in ANSWERED for length in LENGTHS_TOKENS]
    found = {cell: scores(model, tokenizer, prompts_of(*cell, count)) for cell in tqdm(cells, desc="accuracy")}
    pairs = prompts_of("retrieval", EVICTION_LENGTH_TOKENS, count)
    return (
        accuracy_section(found, count)
        + depth_section(found)
        + eviction_section(right_after_evictions(model, tokenizer, pairs), pairs)
        + attention_section(*attention_of_last_token(model, tokenizer, pairs))
        + text_section(model, tokenizer)
    )


def weights_checksum(folder: Path) -> str:
    """The first 16 digits of SHA-256 over the weights, which tie the tables to them."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompts", type=int, default=200, help="for each task and length")
    parser.add_argument("--write", action="store_true", help="put the tables into the model card")
    arguments = parser.parse_args()
    if arguments.write and arguments.model != MODEL:
        parser.error("--write is for the embedded model")
    model, tokenizer = load(arguments.model)
    made_by = (
        f"All tables are printed by `python data/training/evaluate.py --prompts {arguments.prompts}`, here with "
        f"PyTorch {torch.__version__} and Transformers {transformers.__version__}, in float32 on a CPU, "
        f"of the weights whose SHA-256 begins with `{weights_checksum(arguments.model)}`."
    )
    text = f"{textwrap.fill(made_by, 130)}\n\n{sections(model, tokenizer, arguments.prompts)}"
    print(text)
    if arguments.write:
        partial = CARD.with_suffix(".partial")
        partial.write_text(with_measured(CARD.read_text(encoding="utf-8"), text), encoding="utf-8")
        os.replace(partial, CARD)


if __name__ == "__main__":
    main()
