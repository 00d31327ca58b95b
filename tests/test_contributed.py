"""A scorer, a policy, a format without kernels, an estimator and a task of strangers: one file and one row each, no more.

Their files lie in tests/contributed. Every registered one, ours and theirs, passes the contract of its kind.
"""

import json
import sys
from typing import Any

import pandas as pd
import pytest
from channelwise import Channelwise
from ib_kernels import FORMATS
from key_norm import KeyNorm
from offset import OFFSET
from pyramid import pyramid
from reversal import reversal

import ib_analysis as ib
from ib_analysis import cli
from ib_analysis.estimators import ESTIMATORS
from ib_analysis.estimators.known_information import KNOWN_TASKS
from ib_analysis.policies import POLICIES
from ib_analysis.scorers import SCORERS
from ib_analysis.tasks import TASKS
from ib_analysis.tasks.mixture import mixture
from ib_analysis.testing import check_estimator, check_format, check_policy, check_scorer, check_task

ROWS: dict[str, tuple[Any, str, Any, Any]] = {
    "scorer": (SCORERS, "key_norm", KeyNorm(), check_scorer),
    "policy": (POLICIES, "pyramid", pyramid, check_policy),
    "format": (FORMATS, "offset", OFFSET, check_format),
    "estimator": (ESTIMATORS, "channelwise", Channelwise(), check_estimator),
    "task": (TASKS, "reversal", reversal, check_task),
}


TRAINED = ("infonce", "mine", "nwj")  # estimators that train a critic


def everything():
    for kind, (registry, name, contributed, check) in ROWS.items():
        for known, registered in {**registry, name: contributed}.items():
            marks = pytest.mark.slow if known in TRAINED else ()
            yield pytest.param(check, registered, id=f"{kind}-{known}", marks=marks)


@pytest.mark.parametrize(("check", "registered"), list(everything()))
def test_contract(check, registered):
    check(registered)


@pytest.fixture
def rows(monkeypatch):
    """The one row that each of them takes."""
    for registry, name, contributed, _ in ROWS.values():
        monkeypatch.setitem(registry, name, contributed)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ib-analysis", *map(str, arguments)])
    cli.main()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*prompts calibrate")
def test_the_demo_takes_all_of_them(rows, monkeypatch, tmp_path, capsys):
    out = tmp_path / "demo"
    run(monkeypatch, "demo", "--out", out, "--prompts", 8, "--scorer", "key_norm", "--task", "reversal", "--task", "text")
    report = (out / "report.md").read_text()
    assert report in capsys.readouterr().out
    lines = [line for line in report.splitlines() if "| pyramid |" in line]
    assert len(lines) == 4 and all("of tokens at 4 bits" in line for line in lines)
    assert set(pd.read_csv(out / "tradeoff.csv").policy) == {"optimal", "pyramid", "uniform", "prune-only", "quantize-only"}
    saved = json.loads((out / "allocation.json").read_text())
    assert saved["scorer"] == "key_norm"
    assert "offset" in {option.format for option in ib.Profile.load(out / "profile.safetensors").options}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*prompts calibrate")
def test_the_command_line_and_the_information_table_take_all_of_them(rows, monkeypatch, tmp_path, capsys, embedded):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": prompt.text}) + "\n" for prompt in mixture("own", 6, 128, ["reversal"])))
    out = tmp_path / "allocation"
    common = ("--out", out, "--prompts", prompts, "--scorer", "key_norm", "--objective", "channelwise")
    run(monkeypatch, "allocate", "--budget", "1/4", *common)
    assert "optimal by channelwise" in capsys.readouterr().out
    allocation = ib.Allocation.from_json(out / "allocation.json")
    assert allocation.spec.scorer == KeyNorm() and allocation.objective == "channelwise"
    run(monkeypatch, "generate", "--allocation", out / "allocation.json", "--prompt", "List: " + "apple " * 40, "--tokens", 4)
    model, tokenizer = embedded
    table = ib.information(
        model, allocation, mixture("table", 3, 256, ["reversal"]), tokenizer=tokenizer, estimators=["channelwise"]
    )
    heads = table[table.side == "both"]
    assert (heads.channelwise_bits.dropna() >= 0).all() and (heads.channelwise_bits > 0).any()
    run(monkeypatch, "estimators", next(iter(KNOWN_TASKS)), "--samples", 100)
    assert "channelwise" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(monkeypatch, "allocate", "--budget", "1/4", "--out", out, "--scorer", "nothing")
    assert "key_norm" in capsys.readouterr().err


def test_a_task_of_a_stranger_changes_no_default(rows):
    assert all(prompt.task != "reversal" for prompt in mixture("default", 20, 128))
