"""Spend a KV cache's memory where it keeps most information."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import version
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from ib_analysis.errors import CalibrationError, EstimatorError, IBAnalysisError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIN_DEMO_PROMPTS = 8  # so that three calibrate, of which one decides

# What takes seconds to import, PyTorch and transformers, is imported by the commands: --help answers at once.


def main() -> None:
    """Runs one command. An error of this package, or of a file, is one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # consoles that have not all of Unicode show what they lack as \u....
            stream.reconfigure(errors="backslashreplace")
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
    parser.add_argument("--version", action="version", version=version("ib-analysis"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="four budgets on the embedded model, measured on held-out prompts")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to (out/demo)")
    demo.add_argument("--prompts", type=int, metavar="N", help="held-out prompts (256); three eighths as many calibrate")
    _add_method(demo)
    _add_tasks(demo)
    demo.set_defaults(run=_demo)

    allocate = commands.add_parser("allocate", help="find the optimal allocation of a model's cache")
    _add_calibration(allocate, "folder for allocation.json, its figure and the profile")
    _add_tasks(allocate)
    allocate.add_argument("--budget", required=True, help="1/8 or 0.125 of the cache, 2bits, 64MiB@8192 or 512x4bits")
    allocate.add_argument("--objective", default="usable", help="which information to retain (usable); an unknown name lists all")
    allocate.add_argument("--minutes", type=float, help="about how long it may take; Ctrl-C ends it too, with the best so far")
    allocate.set_defaults(run=_allocate)

    report = commands.add_parser(
        "report", help="four budgets of a model, the optimal allocation beside every policy, on fresh prompts"
    )
    _add_calibration(report, "folder for report.md, its figures, the allocation at 1/8 and the profile")
    _add_tasks(report)
    report.add_argument("--held-out", type=Path, help='JSON lines {"text": ...} to measure on, of other documents than --prompts')
    report.set_defaults(run=_report)

    scorers = commands.add_parser("scorers", help="what pruning loses under each scorer, on fresh prompts")
    _add_model(scorers)
    scorers.add_argument("--out", type=Path, required=True, help="folder for scorers.csv and its figure")
    _add_fresh(scorers, "to fit the learned scorer to")
    scorers.add_argument("--scorer", action="append", dest="scorers", help="compare these, with the first; by default all")
    scorers.add_argument("--policy", action="append", dest="policies", help="prune-only (the default), uniform; may be repeated")
    scorers.set_defaults(run=_scorers)

    formats = commands.add_parser("formats", help="what keys and values lose in each format at each precision")
    _add_model(formats)
    formats.add_argument("--out", type=Path, required=True, help="folder for formats.csv and its figure")
    _add_fresh(formats, "to fit the bases of keys to")
    formats.set_defaults(run=_formats)

    answers = commands.add_parser("answers", help="what an allocation loses along a long answer")
    _add_model(answers)
    answers.add_argument("--allocation", type=Path, required=True, help="the allocation.json of `allocate`")
    answers.add_argument(
        "--texts", type=Path, help='JSON lines {"text": ...}, each longer than the context and the answer; by default ours'
    )
    answers.add_argument("--tokens", type=int, default=128, help="of the answer (128)")
    answers.add_argument("--csv", type=Path, help="write the table there")
    answers.set_defaults(run=_answers)

    plane = commands.add_parser("plane", help="measure a cache's information plane: retained information against rate")
    _add_calibration(plane, "folder for both figures, their tables and the profile")
    plane.set_defaults(run=_plane)

    estimators = commands.add_parser("estimators", help="every estimator on every task whose information is known")
    estimators.add_argument("tasks", nargs="*", metavar="TASK", help="names of tasks; by default all that others defined")
    estimators.add_argument("--hard", action="store_true", help="those on which estimates look certain and may be wrong")
    estimators.add_argument("--samples", type=int, default=10_000, help="drawn from each task (10000)")
    estimators.add_argument("--seed", type=int, default=0)
    estimators.add_argument("--csv", type=Path, help="write the whole table there")
    estimators.set_defaults(run=_estimators)

    objectives = commands.add_parser("objectives", help="what each objective of the optimizer costs in measured KL")
    _add_calibration(objectives, "folder for objectives.csv, objectives.md and the profile")
    objectives.set_defaults(run=_objectives)

    generate = commands.add_parser("generate", help="answer a prompt from a compressed cache, or continue a text")
    _add_model(generate)
    generate.add_argument("--allocation", type=Path, required=True, help="the allocation.json of `allocate`")
    generate.add_argument("--prompt", required=True, help="the text, or - to read it from standard input")
    generate.add_argument("--tokens", type=int, default=64, help="how many to generate (64)")
    generate.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="continue the text as it is; by default it is a user's message if the tokenizer has a chat template",
    )
    generate.set_defaults(run=_generate)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub name; by default the embedded model")


def _add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scorer", help="which tokens are kept first (learned); an unknown name lists all")
    parser.add_argument("--question-agnostic", action="store_true", help="compress before any question is seen")


def _add_fresh(parser: argparse.ArgumentParser, fits: str) -> None:
    """Prompts of which some fit and others measure: two files, or our own."""
    parser.add_argument("--prompts", type=Path, help=f'JSON lines {{"text": ...}} {fits}; by default our own')
    parser.add_argument("--held-out", type=Path, help='JSON lines {"text": ...} to measure on, of other documents than --prompts')
    parser.add_argument("--count", type=int, default=64, help="how many of our own prompts (64)")
    parser.add_argument("--question-agnostic", action="store_true", help="compress before any question is seen")
    parser.add_argument("--seed", type=int, default=0)
    _add_tasks(parser)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", action="append", dest="tasks", help="take our own prompts from this task; may be repeated")


def _add_calibration(parser: argparse.ArgumentParser, out: str) -> None:
    _add_model(parser)
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.add_argument(
        "--prompts",
        type=Path,
        help='JSON lines {"text": ...} or {"messages": [...]} to calibrate on; by default the package\'s own',
    )
    _add_method(parser)
    parser.add_argument("--seed", type=int, default=0)


def _demo(arguments: argparse.Namespace) -> None:
    from ib_analysis.experiments.demo import HELD_OUT, run
    from ib_analysis.files import make_folder
    from ib_analysis.scorers import DEFAULT
    from ib_analysis.tasks.mixture import MIXTURE

    held_out = HELD_OUT if arguments.prompts is None else arguments.prompts
    if held_out < MIN_DEMO_PROMPTS:
        raise CalibrationError(f"--prompts {held_out} are too few, as three eighths calibrate: pass {MIN_DEMO_PROMPTS} or more")
    make_folder(arguments.out)
    run(
        arguments.out,
        not arguments.question_agnostic,
        scorer=arguments.scorer or DEFAULT,
        tasks=arguments.tasks or MIXTURE,
        calibrating=held_out * 3 // 8,
        held_out=held_out,
    )


def _allocate(arguments: argparse.Namespace) -> None:
    from ib_analysis.search.budget import parse_budget
    from ib_analysis.search.optimize import optimal_allocation

    budget = parse_budget(arguments.budget)
    model, calibration = _calibration(arguments)
    allocation = optimal_allocation(model, budget, objective=arguments.objective, minutes=arguments.minutes, **calibration)
    allocation.to_json(arguments.out / "allocation.json")
    allocation.plot(arguments.out / "allocation")
    print(allocation)
    print(f"written to {arguments.out}/")


def _calibration(arguments: argparse.Namespace) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and the arguments that every calibration takes. What cannot be read or written fails here, not after it."""
    from ib_analysis.files import make_folder, read_prompts
    from ib_analysis.model.load import load
    from ib_analysis.replay.examples import PROMPT_LENGTH
    from ib_analysis.scorers import DEFAULT
    from ib_analysis.search.optimize import PROMPTS
    from ib_analysis.tasks.mixture import mixture

    prompts: Any = None if arguments.prompts is None else read_prompts(arguments.prompts)
    if getattr(arguments, "tasks", None):
        if prompts is not None:
            raise IBAnalysisError("--task takes our own prompts, --prompts yours: pass one of them")
        prompts = mixture(f"calibration {arguments.seed}", PROMPTS * 3 // 2, PROMPT_LENGTH, arguments.tasks)
    make_folder(arguments.out)
    model, tokenizer = load(arguments.model)
    return model, {
        "prompts": prompts,
        "tokenizer": tokenizer,
        "scorer": arguments.scorer or DEFAULT,
        "question_aware": not arguments.question_agnostic,
        "seed": arguments.seed,
        "profile_path": arguments.out / "profile.safetensors",
    }


def _report(arguments: argparse.Namespace) -> None:
    from ib_analysis.experiments.report import write_report
    from ib_analysis.files import read_prompts
    from ib_analysis.replay.examples import PROMPT_LENGTH
    from ib_analysis.search.optimize import PROMPTS
    from ib_analysis.tasks.mixture import MIXTURE, mixture

    if (arguments.prompts is None) != (arguments.held_out is None):
        raise IBAnalysisError("--prompts calibrates and --held-out measures: pass both, or none for the package's own prompts")
    tasks = arguments.tasks or MIXTURE
    fresh: Any = (
        mixture("held out", PROMPTS, PROMPT_LENGTH, tasks) if arguments.held_out is None else read_prompts(arguments.held_out)
    )
    model, calibration = _calibration(arguments)
    write_report(
        model,
        calibration["tokenizer"],
        calibration["prompts"] or mixture(f"calibration {arguments.seed}", PROMPTS * 3 // 2, PROMPT_LENGTH, tasks),
        fresh,
        arguments.out,
        name=str(arguments.model or "Embedded model"),
        scorer=calibration["scorer"],
        question_aware=not arguments.question_agnostic,
        seed=arguments.seed,
    )


def _scorers(arguments: argparse.Namespace) -> None:
    from ib_analysis.experiments.scorers import scorer_losses, scorers_text
    from ib_analysis.figures.scorers import draw_scorers
    from ib_analysis.policies import POLICIES
    from ib_analysis.scorers import SCORERS, get_scorer
    from ib_analysis.search.optimize import check_name

    scorers, policies = arguments.scorers or list(SCORERS), arguments.policies or ["prune-only"]
    for name in scorers:
        get_scorer(name)
    for name in policies:
        check_name("policy", name, POLICIES)
    table = scorer_losses(**_fresh(arguments), scorers=scorers, policies=policies)
    draw_scorers(table, arguments.out / "scorers")
    print(scorers_text(table))
    print(f"written to {arguments.out}/")


def _fresh(arguments: argparse.Namespace) -> dict[str, Any]:
    """What comparisons take: the model, prompts to fit to and others to measure on. What is wrong with them is said here."""
    from ib_analysis.files import make_folder, read_prompts
    from ib_analysis.model.load import load
    from ib_analysis.replay.examples import PROMPT_LENGTH
    from ib_analysis.tasks.mixture import MIXTURE, mixture

    if (arguments.prompts is None) != (arguments.held_out is None):
        raise IBAnalysisError("--prompts fits and --held-out measures: pass both, or none for the package's own prompts")
    tasks = arguments.tasks or MIXTURE
    calibrating, fresh = (
        mixture(f"{seed} {arguments.seed}", arguments.count, PROMPT_LENGTH, tasks) if path is None else read_prompts(path)
        for seed, path in (("calibration", arguments.prompts), ("held out", arguments.held_out))
    )
    make_folder(arguments.out)
    model, tokenizer = load(arguments.model)
    return {
        "model": model,
        "calibrating": calibrating,
        "fresh": fresh,
        "tokenizer": tokenizer,
        "question_aware": not arguments.question_agnostic,
        "seed": arguments.seed,
    }


def _formats(arguments: argparse.Namespace) -> None:
    from ib_analysis.experiments.formats import format_losses, formats_text
    from ib_analysis.figures.formats import draw_formats

    table = format_losses(**_fresh(arguments))
    draw_formats(table, arguments.out / "formats")
    print(formats_text(table))
    print(f"written to {arguments.out}/")


def _answers(arguments: argparse.Namespace) -> None:
    from ib_analysis.experiments.answers import answer_losses, answers_text
    from ib_analysis.files import check_writable, read_prompts, write_whole
    from ib_analysis.model.load import load
    from ib_analysis.search.allocation import Allocation

    allocation = Allocation.from_json(arguments.allocation)
    texts: Any = None if arguments.texts is None else read_prompts(arguments.texts)
    if arguments.csv is not None:
        check_writable(arguments.csv)
    model, tokenizer = load(arguments.model)
    table = answer_losses(model, allocation, texts, tokenizer=tokenizer, tokens=arguments.tokens)
    if arguments.csv is not None:
        write_whole(arguments.csv, lambda path: table.to_csv(path, index=False))
    print(answers_text(table))


def _plane(arguments: argparse.Namespace) -> None:
    from ib_analysis.experiments.plane import information_plane

    model, calibration = _calibration(arguments)
    plane = information_plane(model, **calibration)
    plane.plot(arguments.out / "plane")
    if not plane.local.empty:
        plane.plot_local(arguments.out / "local_plane")
    print(plane)
    print(f"written to {arguments.out}/")


def _objectives(arguments: argparse.Namespace) -> None:
    from ib_analysis.experiments.objective_costs import costs_text, objective_costs
    from ib_analysis.files import write_whole

    model, calibration = _calibration(arguments)
    costs = objective_costs(model, **calibration)
    write_whole(arguments.out / "objectives.csv", lambda path: costs.to_csv(path, index=False))
    write_whole(arguments.out / "objectives.md", lambda path: path.write_text(costs_text(costs) + "\n", encoding="utf-8"))
    print(costs_text(costs))
    print(f"written to {arguments.out}/")


def _estimators(arguments: argparse.Namespace) -> None:
    from ib_analysis.estimators.comparison import compare, comparison_text, trust
    from ib_analysis.estimators.hard_tasks import HELD_BACK, SEEN
    from ib_analysis.estimators.known_information import KNOWN_TASKS
    from ib_analysis.files import check_writable, write_whole

    if arguments.samples < 2:
        raise EstimatorError(
            f"{arguments.samples} samples say nothing about information: pass --samples 2 or more, 1000 are useful"
        )
    if arguments.seed < 0:
        raise EstimatorError(f"a seed is a whole number from 0 up, not {arguments.seed}: pass another --seed")
    every = {**KNOWN_TASKS, **SEEN, **HELD_BACK}
    unknown = sorted({*arguments.tasks} - {*every})
    if unknown:
        raise EstimatorError(f"there is no task {unknown[0]!r}: use any of {', '.join(map(repr, every))}")
    tasks = [every[name] for name in arguments.tasks or ({**SEEN, **HELD_BACK} if arguments.hard else KNOWN_TASKS)]
    if arguments.csv is not None:
        check_writable(arguments.csv)
    table = compare(arguments.samples, tasks=tasks, seed=arguments.seed)
    if arguments.csv is not None:
        write_whole(arguments.csv, lambda path: table.to_csv(path, index=False))
    print(comparison_text(table))
    print(f"\n{indent(trust(table).to_string(index=False), '  ')}")


def _generate(arguments: argparse.Namespace) -> None:
    from ib_analysis.cache.generation import generate_text
    from ib_analysis.model.load import load
    from ib_analysis.search.allocation import Allocation

    allocation = Allocation.from_json(arguments.allocation)
    text = _prompt_text(arguments.prompt)
    model, tokenizer = load(arguments.model)
    cache = allocation.cache(model)
    chat = bool(tokenizer.chat_template) and not arguments.ignore_chat_template
    print(generate_text(model, tokenizer, text, arguments.tokens, cache, chat=chat))
    tokens = cache.get_seq_length()
    nbytes, full_bytes = cache.nbytes - cache.sliding_nbytes, tokens * allocation.spec.shape.bytes_per_token
    if allocation.is_full:
        kept = f"nothing is compressed, elements are {str(model.dtype).removeprefix('torch.')}"
    else:
        kept = f"{nbytes / full_bytes:.4f} of the 16-bit cache"
    print(f"cache: {tokens} tokens in {nbytes:,} bytes, {kept}", file=sys.stderr)
    if tokens < allocation.minimum_context:
        print(f"the budget holds from {allocation.minimum_context} tokens on, not for this short prompt", file=sys.stderr)


def _prompt_text(prompt: str) -> str:
    """The prompt, or standard input for "-": UTF-8, or UTF-16 with a byte order mark, whatever the console's encoding is."""
    from ib_analysis.files import decoded

    try:
        if prompt == "-":
            return decoded(sys.stdin.buffer.read())
        has_bytes = any("\udc80" <= letter <= "\udcff" for letter in prompt)  # that the console's encoding has not
        return decoded(os.fsencode(prompt)) if has_bytes else prompt
    except UnicodeError as error:
        source = "standard input" if prompt == "-" else "--prompt"
        raise CalibrationError(f"{source} is no text in UTF-8: {error}") from error


if __name__ == "__main__":
    main()
