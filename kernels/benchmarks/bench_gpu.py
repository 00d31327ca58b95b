"""Time everything that runs on a GPU, and compare it with its targets.

    python kernels/benchmarks/bench_gpu.py [--part attention] [--csv gpu.csv] [--table gpu.md] [--seconds 900] [--smoke]

Checks that the kernels are right, then measures part by part: bandwidth, attention, packing, decode. Every result is
written to the CSV file when it is there, and what the file already has for this device is not measured again, so a run can
be stopped and continued; what could not run is tried again. Each part stops after --seconds; another run goes on from
there. --smoke runs all of it at tiny sizes under Triton's interpreter, without a GPU: its times mean nothing.

Modules that import Triton are imported late, because it looks then whether it shall interpret.

Exits with 0 if every target is met, 1 if one is missed or a kernel is wrong or fails, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from results import Measured, Row, Task

PARTS = ("bandwidth", "attention", "packing", "decode")
FAILED = "failed:"
NO_GPU = "there is no CUDA GPU here: run this on a machine that has one, or with --smoke to see that the program works"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="by default all; may be given several times")
    parser.add_argument("--csv", type=Path, default=Path("gpu.csv"))
    parser.add_argument("--table", type=Path, default=Path("gpu.md"))
    parser.add_argument("--seconds", type=float, default=900, help="after which a part stops")
    parser.add_argument("--smoke", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.smoke:
        os.environ["TRITON_INTERPRET"], os.environ["CUDA_VISIBLE_DEVICES"] = "1", ""  # before Triton is imported
    elif not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    return run(chosen.part or PARTS, chosen.csv, chosen.table, chosen.seconds, chosen.smoke)


def run(parts: tuple[str, ...], csv: Path, table: Path, seconds: float, smoke: bool) -> int:
    from correctness import differences
    from results import markdown, ratios, read
    from timing import device_name

    wrong = differences(16, [40, 3]) if smoke else differences(128, [1000, 129, 1])
    for line in wrong:
        print("wrong:", line, file=sys.stderr)
    if wrong:
        return 1
    for part in parts:
        end = time.monotonic() + seconds
        for row in measure(part, csv, smoke, end):
            print(f"{row.part:10} {row.case:34} {row.method:48} {row.milliseconds:10.4f} ms  {row.note}", flush=True)
    rows = read(csv, device_name())
    table.write_text(markdown(rows), encoding="utf-8")
    missed = [ratio for ratio in ratios(rows) if ratio.verdict == "FAIL"]
    failed = [row for row in rows if row.note.startswith(FAILED)]
    print(f"{len(rows)} results in {csv}, {len(missed)} targets missed, {len(failed)} failed; the table is {table}")
    return 1 if missed or any("bits" in row.method for row in failed) else 0


def measure(part: str, csv: Path, smoke: bool, end: float) -> Iterator[Row]:
    """New rows of a part, each written to the CSV file, until time.monotonic() is `end`."""
    from math import isfinite, nan

    from results import Measured, NotRunError, Row, append, read
    from timing import device_name

    done = {row.key for row in read(csv, device_name()) if isfinite(row.milliseconds)}
    for task in tasks(part, smoke):
        if (task.part, task.case, task.method) in done:
            continue
        if time.monotonic() > end:
            print(f"{part}: out of time, run again to go on")
            return
        try:
            measured = task.run()
        except NotRunError as error:
            measured = Measured(nan, 0, note=str(error))
        except torch.OutOfMemoryError:
            measured = Measured(nan, 0, note="out of memory")
        except Exception as error:  # of a baseline, say: the others are still worth measuring
            measured = Measured(nan, 0, note=f"{FAILED} {NotRunError(error)}")
        row = Row.of(device_name(), task, measured)
        append(csv, row)
        yield row


def tasks(part: str, smoke: bool) -> Iterator[Task]:
    from results import Task

    if part == "attention":
        import attention_speed

        yield from attention_speed.tasks(attention_speed.SMOKE_CASES if smoke else attention_speed.CASES)
    elif part == "packing":
        import packing_speed

        yield from packing_speed.tasks(packing_speed.SMOKE_CASES if smoke else packing_speed.CASES)
    elif part == "decode":
        import decode_speed

        yield from decode_speed.tasks(decode_speed.SMOKE_CASES if smoke else decode_speed.CASES)
    else:
        yield Task("bandwidth", "", "read-only stream", partial(time_stream, smoke))


def time_stream(smoke: bool) -> Measured:
    """The floor: nothing that reads as many bytes can be faster."""
    from results import Measured
    from timing import BLOCK, STREAM_BYTES, graph_milliseconds, random_numbers, read_stream

    x = random_numbers(2**16 if smoke else STREAM_BYTES)
    largest = torch.empty(x.numel() // BLOCK, dtype=torch.int32, device=x.device)
    return Measured.of_graphs(graph_milliseconds(lambda: read_stream(x, largest)), 1, x.nbytes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
