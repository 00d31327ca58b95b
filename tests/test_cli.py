"""The command line: its output, its exit status. One call of each command, or more, is as users call it: a process."""

import io
import json
import os
import subprocess
import sys
from copy import deepcopy
from importlib.metadata import version
from itertools import product

import pandas as pd
import pytest

from ib_analysis import cli
from ib_analysis.estimators import ESTIMATORS
from ib_analysis.estimators.known_information import KNOWN_TASKS
from ib_analysis.scorers import SCORERS
from ib_analysis.search.optimize import allocate, full_allocation

pytestmark = pytest.mark.slow

FILLER = "The old clock stood near the quiet street.\n" * 20


def run(*arguments, text=None, cwd=None, console=None):
    """`console` are variables that choose another encoding."""
    command = [sys.executable, "-c", "from ib_analysis.cli import main; main()", *map(str, arguments)]
    inputs = None if text is None else text.encode()
    done = subprocess.run(command, capture_output=True, input=inputs, cwd=cwd, env=os.environ | (console or {}), timeout=300)
    encoding = (console or {}).get("PYTHONIOENCODING", "utf-8")
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding))


@pytest.fixture
def run_here(monkeypatch, capsys):
    """The same in this process, which has imported already what takes seconds. An error that no message says passes through."""

    def run_here(*arguments, text=""):
        monkeypatch.setattr(sys, "argv", ["ib-analysis", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode())))
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run_here


@pytest.fixture(scope="module")
def allocation_file(bench, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "allocation.json"
    allocate(bench, 1 / 4).to_json(path)
    return path


def test_generate_reads_from_the_compressed_cache(allocation_file):
    prompt = f"- acorn apple\n{FILLER}- amber violet\n{FILLER}Find amber"
    done = run("generate", "--allocation", allocation_file, "--prompt", "-", "--tokens", 1, text=prompt)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "violet"
    assert "cache: " in done.stderr


@pytest.mark.parametrize(
    "console",
    [
        {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["cp1252", "ascii"],
)
def test_consoles_that_have_not_all_of_unicode(console, allocation_file):
    """What goes through them is UTF-8, from a pipe and as an argument."""
    prompt = f"Größe → 😀 {FILLER}- amber violet\n{FILLER}Find amber"
    given = (prompt, None) if "LC_ALL" in console else ("-", prompt)
    done = run("generate", "--allocation", allocation_file, "--tokens", 1, "--prompt", given[0], text=given[1], console=console)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "violet"


@pytest.mark.parametrize(("prompt", "source"), [("-", "standard input"), ("x \udcff", "--prompt")])
def test_a_prompt_that_is_no_text_is_named(prompt, source, allocation_file, run_here):
    done = run_here("generate", "--allocation", allocation_file, "--prompt", prompt, text=b"Gr\xf6\x81e")
    assert_one_line(done, f"{source} is no text in UTF-8")


@pytest.fixture
def chat_model(embedded, tmp_path):
    """A folder with the embedded model, whose tokenizer has a chat template."""
    model, tokenizer = embedded
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = "<s>{% for message in messages %}{{ message['content'] }}{% endfor %}Find acorn"
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_generate_uses_the_chat_template(allocation_file, chat_model, run_here):
    """This one asks for a word; without it, the text does for another."""
    text = f"- acorn apple\n{FILLER}- amber violet\n{FILLER}"
    arguments = ["generate", chat_model, "--allocation", allocation_file, "--tokens", 1, "--prompt"]
    answered = run_here(*arguments, text)
    continued = run_here(*arguments, f"{text}Find amber", "--ignore-chat-template")
    assert answered.returncode == continued.returncode == 0, answered.stderr + continued.stderr
    assert (answered.stdout.strip(), continued.stdout.strip()) == ("apple", "violet")


def test_allocate_takes_conversations(chat_model, tmp_path, run_here):
    prompts, out = tmp_path / "chats.jsonl", tmp_path / "out"
    text = "def read(self, size=-1):\n    return self.buffer.read(size)\n" * 8
    messages = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": "Go on."},
    ]
    prompts.write_text("\n".join([json.dumps({"messages": messages}), json.dumps({"text": text})] * 3))
    done = run_here("allocate", chat_model, "--budget", "1/4", "--out", out, "--prompts", prompts, "--minutes", "0.1")
    assert done.returncode == 0, done.stderr
    assert (out / "allocation.json").is_file()
    refused = run_here("allocate", "--budget", "1/4", "--out", tmp_path / "none", "--prompts", prompts)
    assert refused.returncode == 2
    assert "prompt 0 (chat): the tokenizer has no chat template" in refused.stderr


def test_allocate_writes_its_files(tmp_path, run_here):
    prompts = tmp_path / "prompts.jsonl"
    line = json.dumps({"text": "def read(self, size=-1):\n    return self.buffer.read(size)\n" * 8})
    prompts.write_text("\n".join([line] * 6))
    done = run_here("allocate", "--budget", "1/4", "--out", tmp_path / "out", "--prompts", prompts)
    assert done.returncode == 0, done.stderr
    names = {"allocation.json", "allocation.pdf", "allocation.png", "allocation.csv", "profile.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


@pytest.mark.filterwarnings("ignore:.*prompts calibrate")
def test_report_measures_on_other_prompts(tmp_path, run_here):
    line = json.dumps({"text": "def read(self, size=-1):\n    return self.buffer.read(size)\n" * 8})
    for name, count in (("calibration", 6), ("fresh", 3)):
        (tmp_path / name).write_text("\n".join([line] * count))
    done = run_here("report", "--out", tmp_path / "out", "--prompts", tmp_path / "calibration", "--held-out", tmp_path / "fresh")
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Embedded model, 3 held-out prompts whose cache holds" in report and "Answers" not in report
    assert sum(line.startswith("| 1/") and "| optimal |" in line for line in report.splitlines()) == 4


def test_scorers_writes_its_table_and_figure(tmp_path, run_here, monkeypatch):
    """On a console that has not all letters of the folder's name."""
    console, out = io.TextIOWrapper(io.BytesIO(), "cp1252"), tmp_path / "größe → 😀"
    monkeypatch.setattr(sys, "stdout", console)
    done = run_here("scorers", "--out", out, "--count", 2, "--scorer", "value_aware", "--scorer", "keydiff")
    console.seek(0)
    shown = console.read()
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {f"scorers.{kind}" for kind in ("pdf", "png", "csv")}
    assert "| keydiff |" in shown and "größe \\u2192 \\U0001f600/" in shown


def test_answers_prints_a_row_for_each_part(tmp_path, allocation_file, run_here):
    line = json.dumps({"text": "def read(self, size=-1):\n    return self.buffer.read(size)\n" * 60})
    (tmp_path / "texts").write_text("\n".join([line] * 2))
    arguments = ["answers", "--allocation", allocation_file, "--texts", tmp_path / "texts", "--tokens", 40]
    done = run_here(*arguments, "--csv", tmp_path / "answers.csv")
    assert done.returncode == 0, done.stderr
    assert "| 1 to 32 |" in done.stdout and "| 33 to 40 |" in done.stdout
    assert (tmp_path / "answers.csv").read_text().count("\n") == 3


def test_estimators_prints_every_estimator(tmp_path, run_here):
    tasks = list(KNOWN_TASKS)[:2]
    done = run_here("estimators", *tasks, "--samples", 100, "--csv", tmp_path / "table.csv")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "table.csv", keep_default_na=False)
    assert list(zip(table.task, table.estimator)) == list(product(tasks, ESTIMATORS))
    assert [line.split(":")[0] for line in done.stdout.splitlines() if line[:1].strip()] == tasks
    assert sum(line.startswith("  gaussian ") for line in done.stdout.splitlines()) == 2


def test_generate_says_when_nothing_is_compressed(tmp_path, embedded, run_here):
    model, _ = embedded
    path = tmp_path / "full.json"
    full_allocation(model, SCORERS["value_aware"]).to_json(path)
    done = run_here("generate", "--allocation", path, "--prompt", "The old clock stood", "--tokens", 1)
    assert done.returncode == 0, done.stderr
    assert "nothing is compressed, elements are float32" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["estimators", "no such task"], "1v1 normal 0.75"),
        (["estimators", "--seed", "-1"], "seed"),
        (["estimators", "--csv", "FOLDER"], "is a folder"),
        (["allocate", "--budget", "1/4", "--out", "FILE"], "it is a file"),
        (["plane", "--out", "BELOW_FILE"], "cannot write to folder"),
        (["generate", "--allocation", "FOLDER", "--prompt", "x"], "is a folder"),
        (["allocate", "--budget", "12", "--out", "OUT"], "Budget"),
        (["allocate", "--budget", "1/4", "--out", "OUT", "--scorer", "snapKV"], "value_aware, snapkv, streaming_llm"),
        (["allocate", "--budget", "1/4", "--out", "OUT", "--objective", "nothing"], "usable, code_rate"),
        (["allocate", "--budget", "1/4", "--out", "OUT", "--task", "maths"], "retrieval, needles"),
        (["allocate", "--budget", "1/4", "--out", "OUT", "--task", "text", "--prompts", "PROMPTS"], "one of them"),
        (["report", "--out", "OUT", "--prompts", "PROMPTS", "--held-out", "no/such/file"], "no/such/file"),
        (["scorers", "--out", "OUT", "--scorer", "snapKV"], "value_aware, snapkv, streaming_llm"),
        (["scorers", "--out", "OUT", "--policy", "prune"], "there is no policy 'prune'"),
        (["demo", "--out", "OUT", "--scorer", "snapKV"], "value_aware, snapkv, streaming_llm"),
        (["demo", "--out", "OUT", "--task", "maths"], "retrieval, needles"),
        (["objectives", "--out", "OUT", "--scorer", "snapKV"], "value_aware, snapkv"),
        (["plane", "--out", "OUT", "--scorer", "snapKV"], "value_aware, snapkv"),
        (["allocate", "--budget", "1/4000", "--out", "OUT"], "at least"),  # said when prompts are there
        (["allocate", "--budget", "1/4000", "--out", "OUT", "--task", "retrieval", "--task", "text"], "at least"),
        (["allocate", "--budget", "1/4", "--out", "OUT", "--prompts", "no/such/file"], "no/such/file"),
        (["allocate", "./no/such/model", "--budget", "1/4", "--out", "OUT"], "no/such/model"),
        (["allocate", "--budget", "1/4", "--out", "~no such user/out"], "there is no home folder"),
        (["generate", "--allocation", "~no such user/x", "--prompt", "x"], "there is no home folder"),
        (["generate", "--allocation", "FILE", "--prompt", ""], "fewer than two tokens"),
        (["generate", "--allocation", "FILE", "--prompt", "x y", "--tokens", "0"], "tokens"),
        (["answers", "--allocation", "FILE", "--texts", "PROMPTS"], "text 0 has"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(arguments, said, allocation_file, tmp_path, run_here):
    (tmp_path / "prompts.jsonl").write_text('{"text": "some text"}\n')
    places = {
        "PROMPTS": tmp_path / "prompts.jsonl",
        "OUT": tmp_path / "out",
        "FILE": allocation_file,
        "BELOW_FILE": allocation_file / "out",
        "FOLDER": tmp_path,
    }
    assert_one_line(run_here(*(places.get(argument, argument) for argument in arguments)), said)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("allocation*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--prompts", "7"], "pass 8 or more"),
        (["allocate", "--budget", "12", "--out", "out"], "Budget"),
        (["plane", "--out", "out", "--prompts", "no/such/file"], "no/such/file"),
        (["estimators", "--samples", "1"], "samples"),
        (["objectives", "--out", "out", "--prompts", "no/such/file"], "no/such/file"),
        (["report", "--out", "out", "--prompts", "no/such/file"], "pass both"),
        (["scorers", "--out", "out", "--prompts", "no/such/file"], "pass both"),
        (["generate", "--allocation", "no/such/file", "--prompt", "x"], "no/such/file"),
        (["answers", "--allocation", "no/such/file"], "no/such/file"),
    ],
)
def test_errors_of_a_process_are_one_line(arguments, said, tmp_path):
    """One of each command, which imports all that it needs itself."""
    assert_one_line(run(*arguments, cwd=tmp_path), said)
    assert not list(tmp_path.iterdir())


def assert_one_line(done, said):
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("ib-analysis: ")]
    assert len(lines) == 1 and said in lines[0]
    assert "Traceback" not in done.stderr


COMMANDS = ("demo", "allocate", "report", "plane", "estimators", "objectives", "generate")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_answers_without_importing_what_takes_seconds(command):
    code = (
        "import sys; from ib_analysis.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'pandas') if name in sys.modules])"
    )
    arguments = [sys.executable, "-c", code, *([command] if command else []), "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "usage: " in done.stdout
    assert command or all(name in done.stdout for name in COMMANDS)


def test_version():
    done = run("--version")
    assert done.returncode == 0 and done.stdout.strip() == version("ib-analysis")
