"""Compares models on equal terms: `python -m jax_densevit.study --config=configs/study.py:quick --workdir=runs/study`.

Every model of the config is trained on every task with the same crops in the same order, the same budget and optimizer;
short probes on the validation split pick its learning rate, the best step by validation is kept, and the test split is
measured once. `report.md` in the workdir has the tables, learning curves and pictures, `results.json` every number;
they grow with every model that is done.

The same command again goes on where it stopped: what is finished is not done again. Each full run is a workdir like any
other, `<workdir>/<task>/<model>/run`, for evaluate and predict. Fields of the config are overridden by flags:

    --config=configs/study.py:segmentation      arguments for the config file, after a colon
    --config.tasks.segmentation.steps=5000      any field, by its path

Exit codes: 0 everything is done; 75 stopped by SIGTERM or Ctrl-C, run the same command again; 1 an error, said in one
sentence.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jax_densevit.configuration import split_overrides
from jax_densevit.console import run_command
from jax_densevit.errors import UserError
from jax_densevit.studies.plan import Plan, make_plans, read_study
from jax_densevit.studies.report import write_report
from jax_densevit.studies.run import run_study
from jax_densevit.training.stored import local_folder
from jax_densevit.training.trainer import DONE


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("jax_densevit.study", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, metavar="FILE[:ARGUMENT]", help="a Python file with get_config()")
    parser.add_argument("--workdir", help="where runs and the report go")
    parser.add_argument("--dry_run", action="store_true", help="print what would be trained, and leave")
    parser.add_argument("--quiet", action="store_true", help="only a line when something begins")
    overrides, rest = split_overrides(list(argv))
    arguments = parser.parse_args(rest)
    if arguments.workdir is None and not arguments.dry_run:
        raise UserError("--workdir is missing: name the folder where runs and the report shall go.")
    study = read_study(arguments.config, overrides)
    plans = make_plans(study)
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    _print(plans, console)
    if arguments.dry_run:
        return DONE
    workdir = local_folder(arguments.workdir)
    command = shlex.join(["python", "-m", "jax_densevit.study", *argv])

    def report() -> Path:
        return write_report(study, plans, workdir, command)

    code = run_study(
        plans,
        workdir,
        say=lambda line: console.print(line, markup=False, soft_wrap=True, style="bold"),
        finished=report,
        loss_examples=study.loss_examples,
        sheet=study.sheet,
        quiet=arguments.quiet,
    )
    if code == DONE:
        console.print(f"Done: {report()}", markup=False, soft_wrap=True)
    return code


def _print(plans: list[Plan], console: Console) -> None:
    table = Table("task", "model", title="Full runs, each after its probes")
    for column in ("steps", "batch", "GMACs", "PFLOP of training", "probes"):
        table.add_column(column, justify="right")
    for plan in plans:
        probes = f"{len(plan.rates)} x {plan.probe_steps:,}" if plan.probe_steps else "none"
        cells = (f"{plan.config.steps:,}", str(plan.config.batch_size), f"{plan.macs / 1e9:.3g}")
        table.add_row(plan.task, plan.title, *cells, f"{plan.flops / 1e15:.3g}", probes)
    console.print(table)


def run() -> None:
    """The console entry point."""
    run_command(main)


if __name__ == "__main__":
    run()
