"""What is measured, the table that it is kept in, and the targets that it has to meet (see README.md)."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isfinite, nan
from pathlib import Path
from statistics import median

# Shape and context that the targets are for: Llama-3.1-8B, four query heads to a KV head, 128K tokens.
TARGET_CASE = "context 131072 group 4"
SPEED_UP = {4: 3.0, 2: 4.5}  # over SDPA on bf16
SHARE_OF_FLOOR = {4: 0.7, 2: 0.6}  # of the bandwidth of a read-only stream
SHARE_OF_COPY = 0.6  # of the bandwidth of a copy, by quantize-and-pack
SKEWED = 0.85  # of the bandwidth with equal lengths
BASELINES = ("DynamicCache", "QuantizedCache")  # of decoding


@dataclass(frozen=True)
class Measured:
    """`nbytes` have to be read and written, whatever the method; `peak_bytes` is the most memory in use, 0 if not measured."""

    milliseconds: float
    nbytes: int
    peak_bytes: int = 0
    note: str = ""

    @classmethod
    def of_graphs(cls, milliseconds: list[float], layers: int, nbytes: int) -> Measured:
        """The median of several graphs, each of which goes through `layers`, and the range if it is wide."""
        times = [some / layers for some in milliseconds]
        least, most = min(times), max(times)
        return cls(median(times), nbytes, note=f"{least:.4g} to {most:.4g} ms" if most > 1.03 * least else "")


@dataclass(frozen=True)
class Task:
    """Something to measure. `run` raises NotRunError if it cannot be."""

    part: str
    case: str
    method: str
    run: Callable[[], Measured]


class NotRunError(Exception):
    """Why something was not measured: it needs more memory, or a package that is not installed. In one line."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split()).replace("|", "/")[:200]


NAMES = ("device", "part", "case", "method")
NUMBERS = ("milliseconds", "megabytes", "gigabytes_per_second", "peak_gigabytes")


@dataclass(frozen=True)
class Row:
    """A line of the table, in the order of NAMES and NUMBERS; milliseconds are NaN if it was not run, and the note says why."""

    device: str
    part: str
    case: str
    method: str
    milliseconds: float
    megabytes: float
    gigabytes_per_second: float
    peak_gigabytes: float
    note: str

    @classmethod
    def of(cls, device: str, task: Task, measured: Measured) -> Row:
        speed = measured.nbytes / measured.milliseconds / 1e6 if measured.milliseconds > 0 else nan
        numbers = (measured.milliseconds, measured.nbytes / 1e6, speed, measured.peak_bytes / 1e9)
        return cls(device, task.part, task.case, task.method, *numbers, measured.note)

    @classmethod
    def from_line(cls, line: dict[str, str]) -> Row:
        device, part, case, method = (line[name] for name in NAMES)
        milliseconds, megabytes, speed, peak = (float(line[name]) for name in NUMBERS)
        return cls(device, part, case, method, milliseconds, megabytes, speed, peak, line["note"])

    @property
    def key(self) -> tuple[str, str, str]:
        return self.part, self.case, self.method


def read(path: Path, device: str) -> list[Row]:
    """The last result of each task on this device; none if there is no table."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [Row.from_line(line) for line in csv.DictReader(file) if line["device"] == device]
    return list({row.key: row for row in rows}.values())


def append(path: Path, row: Row) -> None:
    """Add a line, with the header if it is the first."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*NAMES, *NUMBERS, "note"], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in asdict(row).items()})


@dataclass(frozen=True)
class Ratio:
    """A measured row against another: above 1 it is the better one. No target if `target` is NaN."""

    row: Row
    against: str
    ratio: float
    target: float = nan

    @property
    def verdict(self) -> str:
        if not isfinite(self.target):
            return ""
        return "pass" if self.ratio >= self.target else "FAIL"


def ratios(rows: list[Row]) -> list[Ratio]:
    """Every ratio that has both its sides."""
    measured = {row.key: row for row in rows if isfinite(row.milliseconds)}
    found = []
    for row in measured.values():
        if row.part == "attention" and "bits" in row.method:
            found += _attention_ratios(row, measured)
        elif row.part == "packing" and row.method != "copy":
            copy = measured.get((row.part, row.case, "copy"))
            if copy:
                target = SHARE_OF_COPY if "context 131072" in row.case else nan
                found.append(Ratio(row, "GB/s of a copy", row.gigabytes_per_second / copy.gigabytes_per_second, target))
        elif row.part == "decode":
            found += [
                Ratio(row, base.method, base.milliseconds / row.milliseconds)
                for base in measured.values()
                if base.case == row.case and base.part == "decode" and base.method.startswith(BASELINES) and base is not row
            ]
    return found


def _attention_ratios(row: Row, measured: dict[tuple[str, str, str], Row]) -> list[Ratio]:
    targeted = row.case.endswith(TARGET_CASE)
    bits = int(row.method.split(" bits")[0].split()[-1])
    speed_up, of_floor = (SPEED_UP[bits], SHARE_OF_FLOOR[bits]) if targeted else (nan, nan)
    found = []
    same_case = [other for other in measured.values() if other.part == "attention" and other.case == row.case]
    sdpa = [other for other in same_case if other.method == "SDPA"]
    others = [other for other in same_case if "bits" not in other.method]
    found += [Ratio(row, "SDPA", base.milliseconds / row.milliseconds, speed_up) for base in sdpa]
    if others:
        fastest = min(others, key=lambda other: other.milliseconds)
        found.append(Ratio(row, f"the fastest on bf16 ({fastest.method})", fastest.milliseconds / row.milliseconds))
    floor = measured.get(("bandwidth", "", "read-only stream"))
    if floor:
        found.append(Ratio(row, "GB/s of a read-only stream", row.gigabytes_per_second / floor.gigabytes_per_second, of_floor))
    equal = measured.get((row.part, row.case, row.method.removesuffix(" skewed")))
    if equal and equal is not row:
        share = row.gigabytes_per_second / equal.gigabytes_per_second
        found.append(Ratio(row, "GB/s with equal lengths", share, SKEWED if targeted else nan))
    return found


def markdown(rows: list[Row]) -> str:
    """Two tables: all that was measured, and every ratio with its target."""
    lines = [
        f"Measured on: {', '.join(sorted({row.device for row in rows}))}",
        "",
        "| part | case | method | ms | MB | GB/s | peak GB | note |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        numbers = (row.milliseconds, row.megabytes, row.gigabytes_per_second, row.peak_gigabytes)
        cells = " | ".join(f"{x:.4g}" if isfinite(x) and x else "" for x in numbers)
        lines.append(f"| {row.part} | {row.case} | {row.method} | {cells} | {row.note} |")
    lines += ["", "| part | case | method | against | ratio | target | |", "|---|---|---|---|---:|---:|---|"]
    for ratio in ratios(rows):
        target = f"{ratio.target:g}" if isfinite(ratio.target) else ""
        names = f"| {ratio.row.part} | {ratio.row.case} | {ratio.row.method} | {ratio.against} "
        lines.append(f"{names}| {ratio.ratio:.2f} | {target} | {ratio.verdict} |")
    return "\n".join(lines) + "\n"
