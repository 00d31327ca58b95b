"""Spend a KV cache's memory where it keeps most information."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ib_analysis.allocation import Allocation
from ib_analysis.budget import parse_budget
from ib_analysis.demo import run
from ib_analysis.errors import CalibrationError, EstimatorError, IBAnalysisError
from ib_analysis.estimators.comparison import compare, comparison_text
from ib_analysis.files import write_whole
from ib_analysis.generation import generate_text
from ib_analysis.models import load
from ib_analysis.objective_costs import costs_text, objective_costs
from ib_analysis.objectives import OBJECTIVES, USABLE
from ib_analysis.optimize import optimal_allocation
from ib_analysis.plane import information_plane
from ib_analysis.scorers import SCORERS
from ib_analysis.tasks.known_information import KNOWN_TASKS


def main() -> None:
    """Runs one command. An error of this package, or of a file, is one line on stderr and exit status 2."""
    arguments = _parser().parse_args()
    try:
        arguments.run(arguments)
    except (IBAnalysisError, OSError) as error:
        print(f"ib-analysis: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ib-analysis: interrupted", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ib-analysis", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="four budgets on the embedded model, measured on held-out prompts")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to (out/demo)")
    demo.add_argument("--question-agnostic", action="store_true", help="compress before any question is seen")
    demo.set_defaults(run=_demo)

    allocate = commands.add_parser("allocate", help="find the optimal allocation of a model's cache")
    _add_calibration(allocate, "folder for allocation.json, its figure and the profile")
    allocate.add_argument("--budget", required=True, help="1/8 or 0.125 of the cache, 2bits, 64MiB@8192 or 512x4bits")
    allocate.add_argument("--scorer", choices=SCORERS, default="value_aware")
    allocate.add_argument("--objective", choices=(USABLE, *OBJECTIVES), default=USABLE, help="which information to retain")
    allocate.set_defaults(run=_allocate)

    plane = commands.add_parser("plane", help="measure a cache's information plane: retained information against rate")
    _add_calibration(plane, "folder for both figures, their tables and the profile")
    plane.set_defaults(run=_plane)

    estimators = commands.add_parser("estimators", help="every estimator on every task whose information is known")
    estimators.add_argument("tasks", nargs="*", metavar="TASK", help="names of tasks; by default all")
    estimators.add_argument("--samples", type=int, default=10_000, help="drawn from each task (10000)")
    estimators.add_argument("--seed", type=int, default=0)
    estimators.add_argument("--csv", type=Path, help="write the whole table there")
    estimators.set_defaults(run=_estimators)

    objectives = commands.add_parser("objectives", help="what each objective of the optimizer costs in measured KL")
    _add_calibration(objectives, "folder for objectives.csv, objectives.md and the profile")
    objectives.set_defaults(run=_objectives)

    generate = commands.add_parser("generate", help="continue a text from a compressed cache")
    _add_model(generate)
    generate.add_argument("--allocation", type=Path, required=True, help="the allocation.json of `allocate`")
    generate.add_argument("--prompt", required=True, help="the text, or - to read it from standard input")
    generate.add_argument("--tokens", type=int, default=64, help="how many to generate (64)")
    generate.set_defaults(run=_generate)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub name; by default the embedded model")


def _add_calibration(parser: argparse.ArgumentParser, out: str) -> None:
    _add_model(parser)
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.add_argument("--prompts", type=Path, help='JSON lines {"text": ...} to calibrate on; by default the package\'s own')
    parser.add_argument("--question-agnostic", action="store_true", help="compress before any question is seen")
    parser.add_argument("--seed", type=int, default=0)


def _demo(arguments: argparse.Namespace) -> None:
    make_folder(arguments.out)
    run(arguments.out, not arguments.question_agnostic)


def _allocate(arguments: argparse.Namespace) -> None:
    budget = parse_budget(arguments.budget)
    model, calibration = _calibration(arguments)
    allocation = optimal_allocation(
        model,
        budget,
        scorer=arguments.scorer,
        objective=arguments.objective,
        **calibration,
    )
    allocation.to_json(arguments.out / "allocation.json")
    allocation.plot(arguments.out / "allocation")
    print(allocation)
    print(f"written to {arguments.out}/")


def _calibration(arguments: argparse.Namespace) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and the arguments that every calibration takes. What cannot be read or written fails here, not after it."""
    prompts = None if arguments.prompts is None else read_prompts(arguments.prompts)
    make_folder(arguments.out)
    model, tokenizer = load(arguments.model)
    return model, {
        "prompts": prompts,
        "tokenizer": tokenizer,
        "question_aware": not arguments.question_agnostic,
        "seed": arguments.seed,
        "profile_path": arguments.out / "profile.safetensors",
    }


def _plane(arguments: argparse.Namespace) -> None:
    model, calibration = _calibration(arguments)
    plane = information_plane(
        model,
        **calibration,
    )
    plane.plot(arguments.out / "plane")
    if not plane.local.empty:
        plane.plot_local(arguments.out / "local_plane")
    print(plane)
    print(f"written to {arguments.out}/")


def _objectives(arguments: argparse.Namespace) -> None:
    model, calibration = _calibration(arguments)
    costs = objective_costs(
        model,
        **calibration,
    )
    write_whole(arguments.out / "objectives.csv", lambda path: costs.to_csv(path, index=False))
    write_whole(arguments.out / "objectives.md", lambda path: path.write_text(costs_text(costs) + "\n"))
    print(costs_text(costs))
    print(f"written to {arguments.out}/")


def _estimators(arguments: argparse.Namespace) -> None:
    if arguments.samples < 2:
        raise EstimatorError(
            f"{arguments.samples} samples say nothing about information: pass --samples 2 or more, 1000 are useful"
        )
    if arguments.seed < 0:
        raise EstimatorError(f"a seed is a whole number from 0 up, not {arguments.seed}: pass another --seed")
    unknown = sorted({*arguments.tasks} - {*KNOWN_TASKS})
    if unknown:
        raise EstimatorError(f"there is no task {unknown[0]!r}: use any of {', '.join(map(repr, KNOWN_TASKS))}")
    tasks = [KNOWN_TASKS[name] for name in arguments.tasks or KNOWN_TASKS]
    if arguments.csv is not None:
        if arguments.csv.is_dir():
            raise IBAnalysisError(f"cannot write a table to {arguments.csv}: it is a folder, pass a file in it")
        make_folder(arguments.csv.parent)
    table = compare(arguments.samples, tasks=tasks, seed=arguments.seed)
    if arguments.csv is not None:
        write_whole(arguments.csv, lambda path: table.to_csv(path, index=False))
    print(comparison_text(table))


def _generate(arguments: argparse.Namespace) -> None:
    allocation = Allocation.from_json(arguments.allocation)
    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    model, tokenizer = load(arguments.model)
    cache = allocation.cache(model)
    print(generate_text(model, tokenizer, text, arguments.tokens, cache))
    tokens = cache.get_seq_length()
    nbytes, full_bytes = cache.nbytes - cache.sliding_nbytes, tokens * allocation.shape.bytes_per_token
    if allocation.is_full:
        kept = f"nothing is compressed, elements are {str(model.dtype).removeprefix('torch.')}"
    else:
        kept = f"{nbytes / full_bytes:.4f} of the 16-bit cache"
    print(f"cache: {tokens} tokens in {nbytes:,} bytes, {kept}", file=sys.stderr)
    if tokens < allocation.minimum_context:
        print(f"the budget holds from {allocation.minimum_context} tokens on, not for this short prompt", file=sys.stderr)


def make_folder(folder: Path) -> None:
    """Makes the folder. Raises IBAnalysisError if nothing could be written there: better before the work than after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
        raise IBAnalysisError(f"cannot write to folder {folder}: {reason}, pass another") from error
    if not os.access(folder, os.W_OK):
        raise IBAnalysisError(f"cannot write to folder {folder}: it is read-only, pass another")


def read_prompts(path: Path) -> list[str]:
    """The texts of a JSON-lines file, blank lines left out. Raises CalibrationError, with the line, for anything else."""
    texts = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # other breaks may be part of a text
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read prompts from {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CalibrationError(f'line {number} of {path} is not {{"text": ...}}') from error
        if not isinstance(text, str):
            raise CalibrationError(f"line {number} of {path} has a text of type {type(text).__name__}")
        texts.append(text)
    return texts


if __name__ == "__main__":
    main()
