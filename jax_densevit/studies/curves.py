"""Learning curves of several runs in one picture, and their scores as a Markdown table.

    python -m jax_densevit.studies.curves runs/vitseg_grid runs/vitseg_rows --output=curves.png

Reads what training wrote into each workdir (`metrics.jsonl`). On the left the training loss, on the right the score of
the evaluators that all runs have, over the steps. The table, on the screen, has a row per evaluation of all runs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jax_densevit.errors import UserError
from jax_densevit.writing import whole_file


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that was cut short while it was written is left out."""
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def read_run(workdir: Path, evaluator: str, score: str) -> tuple[dict[int, float], dict[int, float]]:
    """({step: training loss}, {step: score}) of a run.

    Raises:
      UserError: no such run, or no such score in it.
    """
    file = workdir / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{workdir} is no workdir of a training: there is no metrics.jsonl in it.")
    lines = read_lines(file)
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    scores = {line["step"]: line[score] for line in lines if line.get("evaluator") == evaluator and score in line}
    if not scores:
        raise UserError(f"{file} has no {score!r} of an evaluator {evaluator!r}.")
    return losses, scores


def table(runs: dict[str, tuple[dict[int, float], dict[int, float]]], score: str) -> str:
    """A Markdown table: the score of every run at the steps that all have evaluated, and the loss where it is known."""
    steps = sorted(set.intersection(*(set(scores) for _, scores in runs.values())))
    names = [f"{what}, {name}" for what in (score, "training loss") for name in runs]
    rows = [["step", *names], ["--:"] * (len(names) + 1)]
    for step in steps:
        losses = [run[0].get(step) for run in runs.values()]
        cells = [f"{run[1][step]:.4f}" for run in runs.values()] + ["" if x is None else f"{x:.4f}" for x in losses]
        rows.append([str(step), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def picture(runs: dict[str, tuple[dict[int, float], dict[int, float]]], score: str) -> Figure:
    """Both curves of every run."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, (losses, scores) in runs.items():
        left.plot(list(losses), list(losses.values()), label=name)
        right.plot(list(scores), list(scores.values()), marker="o", markersize=3, label=name)
    for axes, label in ((left, "training loss"), (right, score)):
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def main(argv: list[str] | None = None) -> None:
    """Reads the runs, writes the picture, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", type=Path, help="runs to compare; they are called as their folders are")
    parser.add_argument("--output", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--evaluator", default="val", help="whose scores (default val)")
    parser.add_argument("--score", default="mIoU", help="which score (default mIoU)")
    options = parser.parse_args(argv)
    runs = {path.name: read_run(path, options.evaluator, options.score) for path in options.workdirs}
    with whole_file(options.output) as part:
        picture(runs, options.score).savefig(part, dpi=110)
    print(table(runs, options.score))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from error
