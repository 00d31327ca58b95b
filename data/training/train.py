"""Train the embedded model on the CPU, about an hour on two cores; stop it and start it again as you like.

    python data/training/train.py --setting first --out out/first
    python data/training/train.py --setting second --start out/first --out data/model
    python data/training/train.py --setting small --out out/small     # two minutes, to check that the recipe repeats itself

Every step draws its data from (seed, step) alone, so a run that was killed ends with the weights of one that was not.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import split
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from ib_analysis.model.bundled import MODEL
from ib_analysis.tasks import TASKS, Prompt
from ib_analysis.tasks.retrieval import pairs_prompt

SEED = 1
THREADS = 2
TEXT_WEIGHT, CONTEXT_WEIGHT, FIRST_WEIGHT, REST_WEIGHT = 1.0, 0.1, 5.0, 4.0
MUON_RATE, ADAM_RATE, WARM_UP_STEPS, DECAY_SHARE = 0.02, 3e-3, 100, 0.3
COLUMNS = ("step", "loss", "text_bits_per_token", "first_answer_accuracy")


@dataclass(frozen=True)
class Stage:
    """`steps` batches of `rows` sequences of `length` tokens, a share of them natural text.

    A stage without natural text is dense: short prompts that are nearly all pairs and questions, or lists and copies.
    From these the model learns to retrieve within two million tokens; from a mixture alone it did not in eight.
    """

    steps: int
    rows: int
    length: int
    text_share: float
    copying_share: float = 0.0  # of the prompts, before the rest is drawn from all tasks


@dataclass(frozen=True)
class Setting:
    hidden: int
    layers: int
    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise ValueError("the step is past the last stage")


SETTINGS = {
    "first": Setting(192, 4, (Stage(300, 64, 128, 0.0), Stage(500, 32, 256, 0.4), Stage(1200, 8, 1024, 0.5))),
    "second": Setting(192, 4, (Stage(1000, 8, 1024, 0.5, copying_share=0.4),)),
    "small": Setting(64, 2, (Stage(120, 16, 128, 0.0), Stage(120, 8, 256, 0.5), Stage(80, 2, 1024, 0.5))),
}


def new_model(setting: Setting, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=setting.hidden,
            intermediate_size=setting.hidden * 8 // 3,
            num_hidden_layers=setting.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def dense_prompt(rng: random.Random) -> Prompt:
    """Every pair asked for once, or a short list to copy."""
    if rng.random() < 0.5:
        pairs = rng.randint(4, 12)
        return pairs_prompt(rng, 8 * pairs + rng.randint(0, 20), pairs, pairs, "pairs")
    return TASKS["copying"](rng, rng.randint(24, 64))


def mixed_prompt(rng: random.Random, stage: Stage) -> Prompt:
    """A prompt of up to `stage.length` tokens: pairs with many questions, or one of the tasks."""
    length = rng.randint(64, stage.length)
    if stage.copying_share and rng.random() < stage.copying_share:
        return TASKS["copying"](rng, length)
    if rng.random() < 0.4:
        pairs = rng.randint(6, max(6, min(32, length // 8)))
        return pairs_prompt(rng, length, pairs, rng.randint(1, pairs), "pairs")
    return TASKS[rng.choice(("copying", "copying", "frequency", "needles"))](rng, length)


def task_row(rng: random.Random, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[float]]:
    """Prompts one after the other, cut at `length` + 1 tokens, with the weight of each token in the loss."""
    ids: list[int] = []
    weights: list[float] = []
    while len(ids) <= stage.length:
        prompt = mixed_prompt(rng, stage) if stage.text_share else dense_prompt(rng)
        context = tokenizer(prompt.context).input_ids
        ids += context
        weights += [CONTEXT_WEIGHT] * len(context)
        for question, answer in prompt.turns:
            asked, said = (tokenizer(text, add_special_tokens=False).input_ids for text in (question, answer))
            ids += asked + said
            weights += [CONTEXT_WEIGHT] * len(asked) + [FIRST_WEIGHT] + [REST_WEIGHT] * (len(said) - 1)
    return ids[: stage.length + 1], weights[: stage.length + 1]


def batch(step: int, stage: Stage, text: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and loss weights, both [rows, length + 1]."""
    rng = random.Random(f"{SEED} {step}")
    text_rows = round(stage.rows * stage.text_share)
    ids, weights = [], []
    for row in range(stage.rows):
        if row < text_rows:
            start = rng.randrange(len(text) - stage.length)
            ids.append(text[start : start + stage.length + 1].tolist())
            weights.append([TEXT_WEIGHT] * (stage.length + 1))
        else:
            row_ids, row_weights = task_row(rng, stage, tokenizer)
            ids.append(row_ids)
            weights.append(row_weights)
    return torch.tensor(ids), torch.tensor(weights)


def rate(step: int, steps: int) -> float:
    """Warm up, stay, decay linearly to zero: a share of the full learning rate."""
    return min(1.0, (step + 1) / WARM_UP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def optimizers(model: LlamaForCausalLM) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return (
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.05),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    )


def train_step(
    model: LlamaForCausalLM, optimizer_pair: tuple[torch.optim.Optimizer, ...], ids: torch.Tensor, weights: torch.Tensor
) -> tuple[float, float, float]:
    """One update. Returns loss in nats, text loss in bits a token, accuracy at the first tokens of answers."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(ids.shape[0], -1)
    weights = weights[:, 1:]
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizer_pair:
        optimizer.step()
        optimizer.zero_grad()
    first = weights == FIRST_WEIGHT
    right = (logits.argmax(-1) == ids[:, 1:])[first].float().mean()
    text_bits = losses[(weights == TEXT_WEIGHT).all(1)].mean() / math.log(2)  # NaN in a stage without text
    return loss.item(), text_bits.item(), right.item()


def state_tensors(model: LlamaForCausalLM, optimizer_pair: tuple[torch.optim.Optimizer, ...]) -> dict[str, torch.Tensor]:
    """Weights and optimizer state by name, as references."""
    found = {f"model.{name}": tensor.data for name, tensor in model.named_parameters()}
    for number, optimizer in enumerate(optimizer_pair):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            for key, value in optimizer.state[parameter].items():
                found[f"optimizer.{number}.{index}.{key}"] = value
    return found


def save_checkpoint(path: Path, model: LlamaForCausalLM, pair: tuple[torch.optim.Optimizer, ...], log: list) -> None:
    tensors = state_tensors(model, pair) | {"log": torch.tensor(log, dtype=torch.float64)}
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, pair: tuple[torch.optim.Optimizer, ...]) -> list[list[float]]:
    weights = dict(model.named_parameters())
    with safe_open(path, "pt") as checkpoint:
        for name in checkpoint.keys():
            kind, _, rest = name.partition(".")
            if kind == "model":
                weights[rest].data.copy_(checkpoint.get_tensor(name))
            elif kind == "optimizer":
                number, index, key = rest.split(".")
                parameters = [p for group in pair[int(number)].param_groups for p in group["params"]]
                pair[int(number)].state[parameters[int(index)]][key] = checkpoint.get_tensor(name)
        return checkpoint.get_tensor("log").tolist()


def natural_text(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """All training texts as one sequence of token ids, each begun by the begin token."""
    encoded: Iterator[list[int]] = iter(tokenizer(split()[0], verbose=False).input_ids)
    return torch.tensor([token for text in encoded for token in text], dtype=torch.int16)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, log: list, out: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    with open(out / "training.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([int(step), *(f"{value:.6g}" for value in values)] for step, *values in log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--start", type=Path, help="folder of a model whose weights to begin with")
    parser.add_argument("--checkpoint-steps", type=int, default=100)
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.setting]
    torch.set_num_threads(THREADS)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = natural_text(tokenizer)
    if arguments.start:
        model = LlamaForCausalLM.from_pretrained(arguments.start, dtype=torch.float32).train()
    else:
        model = new_model(setting, len(tokenizer))
    pair = optimizers(model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out / "checkpoint.safetensors"
    log = load_checkpoint(checkpoint, model, pair) if checkpoint.exists() else []
    for step in tqdm(range(len(log), setting.steps), initial=len(log), total=setting.steps, mininterval=30):
        for optimizer, full_rate in zip(pair, (MUON_RATE, ADAM_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = full_rate * rate(step, setting.steps)
        log.append([step, *train_step(model, pair, *batch(step, setting.stage(step), text, tokenizer))])
        if step % 50 == 0:
            tqdm.write(" ".join(f"{name} {value:.4g}" for name, value in zip(COLUMNS, log[-1])))
        if len(log) % arguments.checkpoint_steps == 0:
            save_checkpoint(checkpoint, model, pair, log)
    save_model(model, tokenizer, log, arguments.out)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
