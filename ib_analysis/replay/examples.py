"""Prompts as the model meets them: what is compressed, what follows, and next tokens sampled from the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ib_analysis.cache.attention import cache_argument
from ib_analysis.cache.plan import Recent
from ib_analysis.errors import CalibrationError
from ib_analysis.files import check_unicode
from ib_analysis.model.devices import input_device
from ib_analysis.model.load import check_model
from ib_analysis.replay.conversation import Conversation, split_conversation
from ib_analysis.tasks import Prompt
from ib_analysis.tasks.mixture import mixture

Prompts = Sequence[Prompt | str | Tensor | Conversation]

PROMPT_LENGTH = 512  # of the package's own prompts
MAX_SAMPLED = 32  # tokens sampled for one turn
BATCH_TOKENS = 16384  # prompts are sampled together up to this many tokens


@dataclass(frozen=True)
class Example:
    """One prompt: `prefill` is seen first and its cache compressed, `followup` is then read from the compressed cache.

    The follow-up begins with the last prompt token, so that no prediction comes from the uncompressed prefill.
    """

    task: str
    prefill: Tensor  # int64 [N]
    followup: Tensor  # int64 [M]
    predicting: Tensor  # int64 [Y], positions in the follow-up that predict a sampled token
    asked: Tensor  # int64 [A], positions in the follow-up that predict the first token of a known answer
    answers: Tensor  # int64 [A], that token


@dataclass
class _Draft:
    """A prompt while its turns are sampled."""

    task: str
    context: list[int]
    turns: list[tuple[list[int], list[int]]]  # (question, answer or a text's own continuation)
    known: bool  # whether the answers are known to be right
    sampled: list[list[int]]
    ends: frozenset[int] = frozenset()  # tokens after which nothing is sampled

    @property
    def so_far(self) -> list[int]:
        ids = list(self.context)
        for (question, _), sample in zip(self.turns, self.sampled):
            ids += question + sample
        return ids


def make_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Prompts,
    *,
    question_aware: bool = True,
    seed: int = 0,
) -> list[Example]:
    """Tokenizes prompts and samples every turn's answer from the full model at temperature 1.

    The tokenizer is by default the one saved with the model.

    A text, or a 1-D tensor of token ids, is split: its last 32 tokens, at most an eighth, give way to sampled ones. With
    `question_aware` the first question is read before the cache is compressed, so the scorer sees it.

    A conversation, a list of messages {"role": ..., "content": ...}, is rendered with the tokenizer's chat template. The model's
    answer is sampled until it ends, at most 32 tokens. A last message of the assistant gives way to it, and bounds its length.
    The question is the last user message, the context all before it; a question at least as long as that is context as well.

    Raises CalibrationError if the model is in training mode, if there are no prompts, or if one is too short, has an empty part
    or tokens of another model, or is a conversation that the template does not take, and for a seed that is no whole number from
    0 to 2**31 - 1; UnsupportedModelError for what is no model of transformers.
    """
    check_model(model)
    if model.training:
        raise CalibrationError("the model is in training mode, where dropout is measured as loss: call model.eval() first")
    if isinstance(prompts, str):
        raise CalibrationError("prompts is one text, which would be read as many of a letter each: pass a list of texts")
    if not hasattr(prompts, "__len__"):
        raise CalibrationError(f"prompts is a {type(prompts).__name__}, which can be read only once: pass a list")
    if len(prompts) == 0:
        raise CalibrationError("no prompts: pass at least one text, tensor, conversation or Prompt (64 are a good number)")
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        raise CalibrationError(f"a seed is a whole number from 0 to {2**31 - 1}, not {seed!r}")
    if tokenizer is None and any(isinstance(prompt, (str, Prompt)) or _is_conversation(prompt) for prompt in prompts):
        tokenizer = _saved_tokenizer(model)
    drafts = [_draft(prompt, tokenizer, number, model) for number, prompt in enumerate(prompts)]
    for number, draft in enumerate(drafts):
        _check(draft, number, model)
    device = input_device(model)
    generator = torch.Generator(device).manual_seed(int(seed))
    for turn in range(max(len(draft.turns) for draft in drafts)):
        asking = [draft for draft in drafts if turn < len(draft.turns)]
        asking.sort(key=lambda draft: len(draft.so_far))
        for batch in _batches(asking, turn):
            inputs = [draft.so_far + draft.turns[turn][0] for draft in batch]
            steps = max(_sample_length(draft, turn) for draft in batch)
            for draft, sample in zip(batch, _sample(model, inputs, steps, generator).tolist()):
                draft.sampled.append(_until_end(sample[: _sample_length(draft, turn)], draft.ends))
    return [_example(draft, question_aware, device) for draft in drafts]


def examples_for(
    model: PreTrainedModel,
    prompts: Prompts | None,
    tokenizer: PreTrainedTokenizerBase | None,
    question_aware: bool,
    seed: int,
    count: int,
) -> list[Example]:
    """Examples of these prompts, by default of `count` of the package's own."""
    if prompts is None:
        prompts = mixture(f"calibration {seed}", count, PROMPT_LENGTH)
    return make_examples(model, tokenizer, prompts, question_aware=question_aware, seed=seed)


def median_length(examples: Sequence[Example]) -> int:
    """Of what is seen before the cache is compressed, in tokens."""
    return int(np.median([len(example.prefill) for example in examples]))


def check_lengths(examples: Sequence[Example], recent: Recent) -> None:
    """Raises CalibrationError, with the number of the prompt, if one leaves nothing to compress."""
    for number, example in enumerate(examples):
        if recent.compressible(len(example.prefill)) == 0:
            raise CalibrationError(
                f"prompt {number} has {len(example.prefill)} tokens before its question, all of which every head keeps "
                f"({recent}): pass longer prompts"
            )


def _saved_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"no tokenizer lies beside the model {model.name_or_path!r}: pass tokenizer=, or prompts as token-id tensors"
        ) from error
    return tokenizer


def _is_conversation(prompt: object) -> TypeGuard[Conversation]:
    return isinstance(prompt, (list, tuple)) and all(isinstance(message, Mapping) for message in prompt)


def _draft(
    prompt: Prompt | str | Tensor | Conversation, tokenizer: PreTrainedTokenizerBase | None, number: int, model: PreTrainedModel
) -> _Draft:
    check_unicode("\n".join(_texts(prompt)), f"prompt {number}")
    if isinstance(prompt, Prompt):
        assert tokenizer is not None  # make_examples has looked for one
        context = list(tokenizer(prompt.context).input_ids) if prompt.context else []
        turns = [(_ids(tokenizer, question), _ids(tokenizer, answer)) for question, answer in prompt.turns]
        return _Draft(prompt.task, context, turns, prompt.chance > 0, [])
    if isinstance(prompt, Mapping):
        raise CalibrationError(
            f"prompt {number} is a {type(prompt).__name__}: a conversation is a list of messages, so pass a list of such lists"
        )
    if _is_conversation(prompt):
        assert tokenizer is not None
        context, question, answer = split_conversation(tokenizer, prompt, number)
        if answer is None:
            answer = [0] * MAX_SAMPLED  # any tokens: only their number is used
        return _Draft("chat", context, [(question, answer)], False, [], _end_tokens(model))
    if isinstance(prompt, str):
        assert tokenizer is not None
        ids = list(tokenizer(prompt).input_ids)
    elif isinstance(prompt, Tensor) and prompt.ndim == 1 and not prompt.is_floating_point():
        ids = prompt.tolist()
    else:
        raise CalibrationError(
            f"prompt {number} is {type(prompt).__name__}: pass a text, a 1-D integer torch.Tensor, a Prompt or a conversation "
            '(a list of messages {"role": ..., "content": ...})'
        )
    tail = min(MAX_SAMPLED, len(ids) // 8)
    if tail == 0:
        raise CalibrationError(f"prompt {number} has {len(ids)} tokens: at least 8 are needed, hundreds are useful")
    return _Draft("text", ids[:-tail], [([], ids[-tail:])], False, [])


def _texts(prompt: Prompt | str | Tensor | Conversation) -> list[str]:
    """All that a tokenizer will read."""
    if isinstance(prompt, Prompt):
        return [prompt.context, *(part for turn in prompt.turns for part in turn)]
    if isinstance(prompt, str):
        return [prompt]
    return [str(message.get("content")) for message in prompt] if _is_conversation(prompt) else []


def _check(draft: _Draft, number: int, model: PreTrainedModel) -> None:
    name = f"prompt {number} ({draft.task})"
    if not draft.turns:
        raise CalibrationError(f"{name} has no turns: pass at least one (question, answer)")
    for turn, (_, answer) in enumerate(draft.turns):
        if not answer:
            raise CalibrationError(f"{name} has an empty answer in turn {turn}: pass one, as long as what is predicted")
    if not draft.context or len(draft.context) + len(draft.turns[0][0]) < 2:
        raise CalibrationError(f"{name} has a context of {len(draft.context)} tokens: pass a longer one, for it is compressed")
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = [*draft.context, *(token for turn in draft.turns for part in turn for token in part)]
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise CalibrationError(
            f"{name} has token {wrong}, but the model's vocabulary is 0 to {vocabulary - 1}: use the model's own tokenizer"
        )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []


def _sample_length(draft: _Draft, turn: int) -> int:
    return min(MAX_SAMPLED, len(draft.turns[turn][1]))


def _end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens at which `generate` stops."""
    ends = model.generation_config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or [])


def _until_end(sample: list[int], ends: frozenset[int]) -> list[int]:
    """The sample up to its first end token, which is predicted too."""
    return next((sample[: i + 1] for i, token in enumerate(sample) if token in ends), sample)


def _batches(drafts: list[_Draft], turn: int) -> list[list[_Draft]]:
    """Neighbours in length, up to BATCH_TOKENS a batch."""
    batches: list[list[_Draft]] = [[]]
    for draft in drafts:
        if (len(batches[-1]) + 1) * len(draft.so_far) > BATCH_TOKENS and batches[-1]:
            batches.append([])
        batches[-1].append(draft)
    return batches


@torch.no_grad()
def _sample(model: PreTrainedModel, inputs: list[list[int]], steps: int, generator: torch.Generator) -> Tensor:
    """Tokens [B, steps] sampled at temperature 1 after each input."""
    longest = max(map(len, inputs))
    device = generator.device
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in inputs], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in inputs], device=device)
    cache = cache_argument(model, DynamicCache(config=model.config))
    position = (mask.cumsum(1) - 1).clamp(min=0)
    sampled = []
    for step in range(steps):
        try:
            logits = model(ids, attention_mask=mask, position_ids=position, **cache, logits_to_keep=1).logits[:, -1]
        except IndexError as error:  # of an embedding: all tokens are in the vocabulary, so it is that of positions
            raise CalibrationError(f"the model has no position {longest + step - 1}: pass shorter prompts") from error
        if not bool(torch.isfinite(logits).all()):
            raise CalibrationError("the model's logits are not finite: check its weights and dtype")
        ids = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
        sampled.append(ids)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        position = position[:, -1:] + 1
    return torch.cat(sampled, dim=1)


def _example(draft: _Draft, question_aware: bool, device: torch.device) -> Example:
    everything = draft.so_far
    seen = len(draft.context)
    if question_aware or not draft.turns[0][0]:
        seen += len(draft.turns[0][0]) - 1  # the last prompt token is read from the compressed cache
    predicting, asked, answers = [], [], []
    position = len(draft.context)
    for (question, answer), sample in zip(draft.turns, draft.sampled):
        position += len(question)
        predicting += [position + i - 1 - seen for i in range(len(sample))]
        if draft.known:
            asked.append(position - 1 - seen)
            answers.append(answer[0])
        position += len(sample)
    ids = torch.tensor(everything, device=device)
    return Example(
        draft.task,
        ids[:seen],
        ids[seen:-1],
        torch.tensor(predicting, device=device),
        torch.tensor(asked, dtype=torch.int64, device=device),
        torch.tensor(answers, dtype=torch.int64, device=device),
    )
