"""`python -m jax_densevit.models`: every registered model and variant with its parameters and GMACs."""

import argparse
import json
import os

import jax
from rich.console import Console
from rich.table import Table

from jax_densevit.models.counts import model_table


def main(argv: list[str] | None = None) -> None:
    """Prints the table, or with `--json` its rows (see `counts.model_table`)."""
    parser = argparse.ArgumentParser(prog="python -m jax_densevit.models", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, one object per variant, instead of a table")
    as_json = parser.parse_args(argv).json
    rows = model_table()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(title="Registered models", caption="* the default variant")
    for column in ("model", "variant"):
        table.add_column(column)
    for column in ("image", "classes", "parameters", "as published", "GMACs"):
        table.add_column(column, justify="right")
    last = None
    for row in rows:
        if last not in (None, row["model"]):
            table.add_section()
        last = row["model"]
        table.add_row(
            row["model"],
            row["variant"] + (" *" if row["default"] else ""),
            "{}x{}".format(*row["image_size"]),
            str(row["num_classes"]),
            f"{row['parameters']:,}",
            f"{row['parameters_as_published']:,}",
            f"{row['gmacs']:.1f}",
        )
    # Through a pipe there is no width to fit into: never cut a number.
    console = Console() if os.isatty(1) else Console(width=120)
    console.print(table)
    console.print(
        "parameters: everything that is trained, auxiliary heads included. as published: plus layers that the original "
        "modules (SETR, DPT) own and never use. GMACs: multiply-accumulates of one image forward, in evaluation.",
        highlight=False,
    )


if __name__ == "__main__":
    # Counting needs no accelerator, and must not take one from a training that runs.
    jax.config.update("jax_platforms", "cpu")
    main()
