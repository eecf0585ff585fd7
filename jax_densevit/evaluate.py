"""Evaluates a trained model: `python -m jax_densevit.evaluate --workdir DIR`.

The workdir says everything: model, weights, data and decoding. Scores go to `eval/<name>-<step>.json` below it, beside
a confusion matrix and a picture sheet. What differs from training is given as flags:

    --mode slide --crop 512 --stride 341 --scales 0.5,1.0,1.5 --flip     options of the task's decoding
    --data.root=/other/place                                             options of the evaluator's data source

Scores with other decoding go to a file of their own, `eval/<name>_<options>-<step>.json`. Several processes share the
work when each runs the command with the flags of `train` for that (`--distributed`, or `--coordinator` and its like).
"""

import argparse
import datetime
from collections.abc import Sequence
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from jax_densevit.console import progress_bar, run_command, split_options
from jax_densevit.errors import UserError
from jax_densevit.experiment import Evaluator, Loaded, build_evaluators, load, versions
from jax_densevit.hosts import add_flags, together
from jax_densevit.training.evaluation import Evaluation, evaluate, save_evaluation
from jax_densevit.training.mesh import make_mesh
from jax_densevit.training.processes import check_agreement, check_same_data


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("jax_densevit.evaluate", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workdir", required=True, help="the folder that training wrote")
    parser.add_argument("--name", help="which evaluator of the config; all of them by default")
    parser.add_argument("--step", type=int, help="which checkpoint; by default the best, or the latest without a score")
    parser.add_argument("--which", choices=("best", "ema", "params"), default="best", help="which weights of it")
    parser.add_argument("--batch_size", type=int, default=0, help="by default the evaluator's")
    parser.add_argument("--limit", type=int, help="only the first so many examples; 0 = all")
    add_flags(parser)
    arguments, rest = parser.parse_known_args(argv)
    with together(arguments):
        return _run(arguments, rest)


def _run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    options = split_options(rest)
    data = {name.removeprefix("data."): value for name, value in options.items() if name.startswith("data.")}
    decode = {name: value for name, value in options.items() if not name.startswith("data.")}

    mesh = make_mesh()
    loaded = load(arguments.workdir, step=arguments.step, which=arguments.which, decode=decode, mesh=mesh)
    evaluators = _evaluators(loaded, arguments.name, data, decode)
    given = {name: getattr(arguments, name) for name in ("name", "which", "batch_size", "limit")}
    check_agreement({"step": loaded.step, "flags": {**given, **options}})
    check_same_data({one.name: one.source for one in evaluators})
    console = Console()
    for evaluator in evaluators:
        with progress_bar(evaluator.name) as progress:
            found = evaluate(
                evaluator.task,
                loaded.forward,
                evaluator.source,
                mesh=mesh,
                batch_size=arguments.batch_size or evaluator.batch_size,
                limit=evaluator.limit if arguments.limit is None else arguments.limit,
                sheet=evaluator.sheet,
                progress=progress,
            )
        facts = {
            "data": {**loaded.config.eval[evaluator.name].data.to_dict(), **data},
            "weights": arguments.which,
            "versions": versions(),
            "device": f"{len(mesh.devices.flat)} x {mesh.devices.flat[0].device_kind}",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        if jax.process_index() == 0:
            name = "_".join([evaluator.name, *(f"{key}={_short(value)}" for key, value in decode.items())])
            paths = save_evaluation(found, evaluator.task, arguments.workdir, name, loaded.step, facts)
            _print(console, found, evaluator, loaded.step)
            for path in paths:
                console.print(str(path), soft_wrap=True, highlight=False)
    return 0


def _evaluators(
    loaded: Loaded, name: str | None, data: dict[str, Any], decode: dict[str, Any]
) -> tuple[Evaluator, ...]:
    """The evaluators of the checkpoint's config with the overrides of the command line."""
    config = loaded.config.copy_and_resolve_references()
    if not config.eval:
        raise UserError("The config of this checkpoint has no evaluator (config.eval is empty).")
    names = tuple(config.eval) if name is None else (name,)
    with config.unlocked():
        for known in names:
            if known in config.eval:
                config.eval[known].data.update(data)
                config.eval[known].decode.update(decode)
    return build_evaluators(config, loaded.info, names)


def _print(console: Console, found: Evaluation, evaluator: Evaluator, step: int) -> None:
    table = Table(title=f"{evaluator.name}, step {step}, {found.count} examples")
    table.add_column("score", overflow="fold")
    show, unit = (_cell, "%") if evaluator.task.percent else (_number, "value")
    for title in (unit, *found.baselines):
        table.add_column(title, justify="right", overflow="fold")
    for key, value in found.summary.items():
        table.add_row(key, show(value), *(show(numbers[key]) for numbers in found.baselines.values()))
    console.print(table)
    rows: dict[str, dict[str, Any]] = {}
    for result in found.results.values():  # one table of all that is known of a class
        for row in result.get("per_class", ()):
            rows.setdefault(row["class"], {}).update(row)
    if rows:
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
        for column in columns:  # on a narrow screen words go on in the next line, nothing is cut
            justify = "left" if column == "class" else "right"
            table.add_column(column.replace("_", " "), justify=justify, overflow="fold")
        for row in rows.values():
            table.add_row(*(_cell(row.get(column)) for column in columns))
        console.print(table)


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    return f"{100 * value:.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.4g}"


def _short(value: Any) -> str:
    """A value as a part of a file name."""
    text = "x".join(str(item) for item in value) if isinstance(value, list | tuple) else str(value)
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text)


def run() -> None:
    """The console entry point."""
    run_command(main)


if __name__ == "__main__":
    run()
