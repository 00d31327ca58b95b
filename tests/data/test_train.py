"""Training repeats itself exactly, and a run that was killed and started again ends like one that was not."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import train
from transformers import AutoTokenizer

from ib_analysis.model.bundled import MODEL

pytestmark = pytest.mark.slow

SMALL = train.Setting(32, 1, (train.Stage(3, 3, 64, 0.0), train.Stage(4, 3, 96, 0.4, copying_share=0.5)))


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """A setting of seven steps over one page of text; as many threads as the other tests have."""
    monkeypatch.setitem(train.SETTINGS, "small", SMALL)
    text = Path(train.__file__).read_text(encoding="utf-8")
    monkeypatch.setattr(train, "natural_text", lambda tokenizer: torch.tensor(tokenizer(text, verbose=False).input_ids))
    monkeypatch.setattr(train, "THREADS", torch.get_num_threads())


def run(monkeypatch, out: Path, *arguments: str) -> tuple[str, dict[str, torch.Tensor]]:
    """The log, and the weights in float32 before they are rounded to be saved."""
    weights = {}
    save_model = train.save_model

    def keep(model, *rest):
        weights.update({name: tensor.detach().clone() for name, tensor in model.named_parameters()})
        save_model(model, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_model", keep)
        patch.setattr(sys, "argv", ["train.py", "--setting", "small", "--out", str(out), *arguments])
        train.main()
    return (out / "training.csv").read_text(), weights


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one and one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_same_seed_same_run(tmp_path, monkeypatch):
    log, weights = run(monkeypatch, tmp_path / "one")
    again_log, again_weights = run(monkeypatch, tmp_path / "two")
    assert log == again_log
    assert_equal(weights, again_weights)
    monkeypatch.setattr(train, "SEED", 2)
    assert run(monkeypatch, tmp_path / "three")[0] != log


def test_killed_and_started_again(tmp_path, monkeypatch):
    log, weights = run(monkeypatch, tmp_path / "whole")
    train_step = train.train_step
    steps_done = 0

    def counted(*arguments, killed_at=None):
        nonlocal steps_done
        if steps_done == killed_at:
            raise KeyboardInterrupt
        steps_done += 1
        return train_step(*arguments)

    monkeypatch.setattr(train, "train_step", partial(counted, killed_at=5))
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path / "killed", "--checkpoint-steps", "4")
    assert (tmp_path / "killed" / "checkpoint.safetensors").exists()

    steps_done = 0
    monkeypatch.setattr(train, "train_step", counted)
    resumed_log, resumed = run(monkeypatch, tmp_path / "killed", "--checkpoint-steps", "4")
    assert steps_done == SMALL.steps - 4
    assert resumed_log == log
    assert_equal(resumed, weights)
    assert not (tmp_path / "killed" / "checkpoint.safetensors").exists()


def test_a_second_run_starts_from_the_weights_of_the_first(tmp_path, monkeypatch):
    _, first = run(monkeypatch, tmp_path / "first")
    starts = []
    train_step = train.train_step

    def keep(model, *rest):
        starts.append({name: tensor.detach().clone() for name, tensor in model.named_parameters()})
        return train_step(model, *rest)

    monkeypatch.setattr(train, "train_step", keep)
    _, second = run(monkeypatch, tmp_path / "second", "--start", str(tmp_path / "first"))
    assert_equal(starts[0], {name: tensor.bfloat16().float() for name, tensor in first.items()})
    assert any(not torch.equal(starts[0][name], second[name]) for name in second)


@pytest.mark.parametrize("stage", SMALL.stages)
def test_weights_mark_the_answers(stage):
    """Of the rows made of tasks: the largest weight is on the first token of each answer, behind its question."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids, weights = train.batch(5, stage, torch.arange(3, 1003), tokenizer)
    assert ids.shape == weights.shape == (stage.rows, stage.length + 1)
    text_rows = round(stage.rows * stage.text_share)
    assert (weights[:text_rows] == train.TEXT_WEIGHT).all()
    for row, row_weights in zip(ids[text_rows:], weights[text_rows:]):
        first = (row_weights == train.FIRST_WEIGHT).nonzero().flatten().tolist()
        assert first
        for place in first:
            question = tokenizer.decode(row[:place]).splitlines()[-1]
            assert question in ("List:", "Most votes:") or question.startswith("Find "), question


def test_stages_follow_each_other():
    assert [SMALL.stage(step) for step in range(SMALL.steps)] == [SMALL.stages[0]] * 3 + [SMALL.stages[1]] * 4
    with pytest.raises(ValueError, match="past the last stage"):
        SMALL.stage(7)
