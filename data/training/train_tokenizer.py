"""Train the embedded model's tokenizer: 2,048 byte-level unigram pieces, every task word a single piece.

python data/training/train_tokenizer.py
"""

from __future__ import annotations

import json

from corpus import split
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram
from tokenizers.trainers import UnigramTrainer
from transformers import PreTrainedTokenizerFast

from ib_analysis.model.bundled import MODEL
from ib_analysis.tasks.words import ADJECTIVES, NOUNS, PLACES, VERBS, WORDS

VOCABULARY = 2048
CONTEXT = 1024
SPECIAL = ["<pad>", "<s>", "</s>"]
CUES = ["The", " the", "Find", "List", "Votes", "Most", " votes"]
WORD_SCORE = -7.0  # log-probability: above that of any way to spell a task word in smaller pieces


def with_words(pieces: list[tuple[str, float]], task_words: list[str]) -> Unigram:
    """The trained pieces plus every task word as a piece of its own."""
    scores = dict(pieces)
    scores |= {word.replace(" ", "Ġ"): WORD_SCORE for word in task_words}
    return Unigram(list(scores.items()))


def main() -> None:
    task_words = [f" {word}" for word in (*WORDS, *ADJECTIVES, *NOUNS, *VERBS, *PLACES)] + CUES
    tokenizer = Tokenizer(Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = UnigramTrainer(
        vocab_size=VOCABULARY - len(task_words),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        unk_token=None,
        show_progress=False,
    )
    tokenizer.train_from_iterator(split()[0], trainer)
    tokenizer.model = with_words(json.loads(tokenizer.to_str())["model"]["vocab"], task_words)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    broken = [word for word in task_words if len(tokenizer.encode(word, add_special_tokens=False)) != 1]
    if broken:
        raise SystemExit(f"not a single token: {broken}")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=CONTEXT,
    ).save_pretrained(MODEL)


if __name__ == "__main__":
    main()
