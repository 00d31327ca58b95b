"""The command line as users call it: a process, its output, its exit status."""

import json
import subprocess
import sys
from itertools import product

import pandas as pd
import pytest

from ib_analysis.cli import read_prompts
from ib_analysis.errors import CalibrationError
from ib_analysis.estimators import ESTIMATORS
from ib_analysis.optimize import allocate, full_allocation
from ib_analysis.shape import cache_shape
from ib_analysis.tasks.known_information import KNOWN_TASKS


def run(*arguments, text=None):
    command = [sys.executable, "-c", "from ib_analysis.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=text, timeout=300)


@pytest.fixture(scope="module")
def allocation_file(bench, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "allocation.json"
    allocate(bench, 1 / 4).to_json(path)
    return path


def test_generate_reads_from_the_compressed_cache(allocation_file):
    filler = "The old clock stood near the quiet street.\n" * 20
    prompt = f"- acorn apple\n{filler}- amber violet\n{filler}Find amber"
    done = run("generate", "--allocation", allocation_file, "--prompt", "-", "--tokens", 1, text=prompt)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "violet"
    assert "cache: " in done.stderr


def test_allocate_writes_its_files(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    line = json.dumps({"text": "def read(self, size=-1):\n    return self.buffer.read(size)\n" * 8})
    prompts.write_text("\n".join([line] * 6))
    done = run("allocate", "--budget", "1/4", "--out", tmp_path / "out", "--prompts", prompts)
    assert done.returncode == 0, done.stderr
    names = {"allocation.json", "allocation.pdf", "allocation.png", "allocation.csv", "profile.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_estimators_prints_every_estimator(tmp_path):
    tasks = list(KNOWN_TASKS)[:2]
    done = run("estimators", *tasks, "--samples", 100, "--csv", tmp_path / "table.csv")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "table.csv", keep_default_na=False)
    assert list(zip(table.task, table.estimator)) == list(product(tasks, ESTIMATORS))
    assert [line.split(":")[0] for line in done.stdout.splitlines() if line[:1].strip()] == tasks
    assert sum(line.startswith("  gaussian ") for line in done.stdout.splitlines()) == 2


def test_prompts_are_split_at_line_feeds_only(tmp_path):
    texts = ["one\u2028two\u0085three", "four\tfive", "six"]
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n\n".join(lines) + "\r\n  \n", encoding="utf-8", newline="")
    assert read_prompts(path) == texts
    path.write_text("\n".join([*lines, "", "{}"]), encoding="utf-8")
    with pytest.raises(CalibrationError, match="line 5 of"):
        read_prompts(path)


def test_generate_says_when_nothing_is_compressed(tmp_path, embedded):
    model, _ = embedded
    path = tmp_path / "full.json"
    full_allocation(model, cache_shape(model.config), "value_aware").to_json(path)
    done = run("generate", "--allocation", path, "--prompt", "The old clock stood", "--tokens", 1)
    assert done.returncode == 0, done.stderr
    assert "nothing is compressed, elements are float32" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["estimators", "--samples", "1"], "samples"),
        (["estimators", "no such task"], "1v1 normal 0.75"),
        (["estimators", "--seed", "-1"], "seed"),
        (["estimators", "--csv", "FOLDER"], "is a folder"),
        (["allocate", "--budget", "1/4", "--out", "FILE"], "it is a file"),
        (["plane", "--out", "BELOW_FILE"], "cannot write to folder"),
        (["generate", "--allocation", "FOLDER", "--prompt", "x"], "is a folder"),
        (["allocate", "--budget", "12", "--out", "OUT"], "Budget"),
        (["allocate", "--budget", "1/4000", "--out", "OUT"], "at least"),
        (["allocate", "--budget", "1/4", "--out", "OUT", "--prompts", "no/such/file"], "no/such/file"),
        (["allocate", "./no/such/model", "--budget", "1/4", "--out", "OUT"], "no/such/model"),
        (["plane", "--out", "OUT", "--prompts", "no/such/file"], "no/such/file"),
        (["generate", "--allocation", "no/such/file", "--prompt", "x"], "no/such/file"),
        (["generate", "--allocation", "FILE", "--prompt", ""], "fewer than two tokens"),
        (["generate", "--allocation", "FILE", "--prompt", "x y", "--tokens", "0"], "tokens"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(arguments, said, allocation_file, tmp_path):
    places = {"OUT": tmp_path / "out", "FILE": allocation_file, "BELOW_FILE": allocation_file / "out", "FOLDER": tmp_path}
    done = run(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("ib-analysis: ")]
    assert len(lines) == 1 and said in lines[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("allocation*"))
