"""The benchmark program without a GPU: at tiny sizes under the interpreter, in a process of its own; and its arithmetic."""

import csv
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import bench_gpu
from attention_speed import CASES, Case, run_lengths
from results import Measured, NotRunError, Row, Task, append, markdown, ratios, read

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parents[2] / "kernels" / "benchmarks" / "bench_gpu.py"
LLAMA = "batch 1 context 131072 group 4"


def test_smoke_run_measures_everything_and_can_be_continued(tmp_path):
    table, page = tmp_path / "gpu.csv", tmp_path / "gpu.md"
    arguments = [sys.executable, str(PROGRAM), "--smoke", "--csv", str(table), "--table", str(page)]
    run = subprocess.run(arguments, capture_output=True, text=True, cwd=PROGRAM.parents[2])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["part"] for line in lines} == set(bench_gpu.PARTS)
    measured = [line for line in lines if line["milliseconds"] != "nan"]
    assert all(line["note"] for line in lines if line not in measured)
    for method in ("read-only stream", "SDPA", "kivi 2 bits skewed", "rotated 4 bits", "copy", "DynamicCache, sdpa"):
        assert any(line["method"] == method and float(line["gigabytes_per_second"]) > 0 for line in measured)
    assert "| GB/s of a read-only stream |" in page.read_text()
    for part in bench_gpu.PARTS:  # nothing is measured twice, but what did not run is tried again
        assert all(math.isnan(row.milliseconds) for row in bench_gpu.measure(part, table, smoke=True, end=math.inf))


def test_refuses_to_time_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main(["--csv", str(tmp_path / "gpu.csv")]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "gpu.csv").exists()


def test_stops_when_its_time_is_over(tmp_path, capsys):
    assert list(bench_gpu.measure("attention", tmp_path / "gpu.csv", smoke=True, end=time.monotonic() - 1)) == []
    assert "run again" in capsys.readouterr().out


def test_one_failure_does_not_end_the_others(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("no such | kernel")

    some = [Task("packing", "case", name, run) for name, run in (("copy", broken), ("kivi 4 bits", lambda: Measured(1.0, 8)))]
    monkeypatch.setattr(bench_gpu, "tasks", lambda part, smoke: iter(some))
    first, second = bench_gpu.measure("packing", tmp_path / "gpu.csv", smoke=True, end=math.inf)
    assert first.note == "failed: no such / kernel" and math.isnan(first.milliseconds)
    assert second.milliseconds == 1.0


def row(method, milliseconds, nbytes=10**8, part="attention", case=LLAMA, device="H100"):
    measured = Measured(milliseconds, nbytes)
    return Row.of(device, Task(part, case, method, lambda: measured), measured)


def found(rows, method, against):
    return next(ratio for ratio in ratios(rows) if ratio.row.method == method and ratio.against == against)


def test_ratios_and_targets():
    rows = [
        row("read-only stream", 0.1, 2 * 10**8, part="bandwidth", case=""),  # 2000 GB/s
        row("SDPA", 0.25, 4 * 10**8),
        row("SDPA flash", 0.2, 4 * 10**8),
        row("kivi 4 bits", 0.08),  # 1250 GB/s
        row("kivi 4 bits skewed", 0.1),
        row("kivi 2 bits", 0.08, 5 * 10**7),
        row("copy", 1.0, 10**9, part="packing", case="batch 8 context 131072 kept 1/1"),
        row("kivi 2 bits", 1.0, 5 * 10**8, part="packing", case="batch 8 context 131072 kept 1/1"),
    ]
    over_sdpa = found(rows, "kivi 4 bits", "SDPA")
    assert over_sdpa.ratio == pytest.approx(3.125) and over_sdpa.verdict == "pass"
    assert found(rows, "kivi 2 bits", "SDPA").verdict == "FAIL"
    fastest = found(rows, "kivi 4 bits", "the fastest on bf16 (SDPA flash)")
    assert fastest.ratio == pytest.approx(2.5) and fastest.verdict == ""
    of_floor = found(rows, "kivi 4 bits", "GB/s of a read-only stream")
    assert of_floor.ratio == pytest.approx(0.625) and of_floor.target == 0.7 and of_floor.verdict == "FAIL"
    skewed = found(rows, "kivi 4 bits skewed", "GB/s with equal lengths")
    assert skewed.ratio == pytest.approx(0.8) and skewed.verdict == "FAIL"
    packing = found(rows, "kivi 2 bits", "GB/s of a copy")
    assert packing.ratio == pytest.approx(0.5) and packing.verdict == "FAIL"
    assert f"| attention | {LLAMA} | kivi 4 bits | SDPA | 3.12 | 3 | pass |" in markdown(rows)


def test_targets_are_for_long_contexts_of_four_heads():
    other = "batch 1 context 4096 group 4"
    rows = [row("SDPA", 1.0, case=other), row("kivi 4 bits", 1.0, case=other)]
    assert found(rows, "kivi 4 bits", "SDPA").verdict == ""


def test_what_was_not_run_has_no_ratio():
    rows = [row("SDPA", math.nan), row("kivi 4 bits", 1.0)]
    assert ratios(rows) == []
    assert str(NotRunError("two\nlines | and a bar")) == "two lines / and a bar"


def test_rows_of_other_devices_are_left_out(tmp_path):
    path = tmp_path / "gpu.csv"
    assert read(path, "H100") == []
    mine, skipped = row("SDPA", 2.5), row("flash_attn", math.nan)
    for some in (mine, row("SDPA", 2.0, device="A100"), skipped):
        append(path, some)
    again = read(path, "H100")
    assert again[0] == mine and again[1].key == skipped.key and math.isnan(again[1].milliseconds)


@pytest.mark.parametrize("case", [*CASES[:6], Case(2, 96, 4, heads=2)])
def test_skewed_lengths_hold_as_many_tokens(case):
    case = replace(case, head_dim=16)
    equal, skewed = run_lengths(case, skewed=False), run_lengths(case, skewed=True)
    assert equal.sum() == skewed.sum() == case.pairs * case.context
    assert (equal == case.context).all() and (skewed >= 0).all() and (skewed % 32 == 0).all()
    assert skewed.max() >= 1.3 * case.context
