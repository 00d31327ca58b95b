"""The code in the documents runs: what a reader copies first."""

import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import ib_analysis as ib
from ib_analysis.tasks.mixture import mixture

ROOT = Path(__file__).parents[1]


def blocks(document):
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def kinds():
    for block in blocks("CONTRIBUTING.md"):
        for kind in re.findall(r"^check_(\w+)\(", block, re.MULTILINE):
            yield pytest.param(block, id=kind)


@pytest.mark.parametrize("block", list(kinds()))
def test_examples_of_contributions_keep_their_contracts(block):
    exec(block, {})


def test_there_is_an_example_of_every_kind():
    assert [parameters.id for parameters in kinds()] == ["scorer", "policy", "format", "estimator", "task"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*prompts calibrate")
def test_the_readme_runs(monkeypatch, tmp_path, capfd):
    """On the embedded model, with few prompts."""
    monkeypatch.chdir(tmp_path)
    Path("report.txt").write_text("".join(prompt.text for prompt in mixture("report", 2, 256)))
    few: dict[str, Any] = {"prompts": mixture("readme", 8, 256)}
    load = partial(ib.load, None)
    optimal_allocation = partial(ib.optimal_allocation, **few)
    information_plane = partial(ib.information_plane, **few, shares=(1 / 2, 1 / 8))
    monkeypatch.setattr(ib, "load", lambda name: load(), raising=False)
    monkeypatch.setattr(ib, "optimal_allocation", optimal_allocation, raising=False)
    monkeypatch.setattr(ib, "information_plane", information_plane, raising=False)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for block in blocks("README.md"):
            exec(block, names)
    assert "deprecated" not in capfd.readouterr().err
    assert names["allocation"].budget_share == 1 / 8
    assert len(names["plane"].points) and len(names["table"])
    assert {"heads.pdf", "heads.png", "heads.csv", "allocation.json"} <= {path.name for path in tmp_path.iterdir()}
