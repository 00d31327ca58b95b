"""The command line: ib-analysis demo."""

from __future__ import annotations

import argparse
import sys
from random import Random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.errors import IBAnalysisError
from ib_analysis.models import load
from ib_analysis.tasks import TASKS


def main() -> None:
    """Runs one command. An error of this package is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="ib-analysis", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="answer three held-out prompts with the embedded model")
    parser.parse_args()
    try:
        demo()
    except IBAnalysisError as error:
        print(f"ib-analysis: {error}", file=sys.stderr)
        sys.exit(2)


def demo() -> None:
    """Answers one held-out prompt of each of three tasks with the full cache."""
    model, tokenizer = load()
    for task in ("retrieval", "needles", "copying"):
        prompt = TASKS[task](Random(f"demo {task}"), 512)
        answer = generate(model, tokenizer, prompt.context + prompt.question, len(tokenizer(prompt.answer).input_ids) - 1)
        print(f"{task}: {prompt.question!r}\n  expected {prompt.answer!r}\n  answered {answer!r}")


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> str:
    """The greedy continuation of a text."""
    inputs = tokenizer(text, return_tensors="pt")
    out = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=tokens, do_sample=False
    )
    continuation: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    return continuation
