"""Reads every image and mask that a config trains and evaluates on, before training, and says what is wrong.

python -m jax_densevit.check_data --config=configs/own_folder.py [--split=train] [--json]

Leaves with exit code 1 when something would stop or spoil training, else 0 (warnings included).
"""

import argparse
import json

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jax_densevit.configuration import read_config, split_overrides
from jax_densevit.console import progress_bar, run_command
from jax_densevit.data.inspection import SHOWN, Finding, Inspection, inspect, overlap
from jax_densevit.data.pipeline import default_threads
from jax_densevit.data.raw import inspecting
from jax_densevit.data.source import DataInfo
from jax_densevit.data.sources import create_source
from jax_densevit.errors import UserError, did_you_mean


def main(argv: list[str]) -> int:
    """Runs the command with its arguments (without the program's name); returns the exit code."""
    parser = argparse.ArgumentParser(prog="jax_densevit.check_data", description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="the config that names the data")
    parser.add_argument("--split", default="", help="only 'train' or one evaluator; left out: all of them")
    parser.add_argument("--limit", type=int, default=0, help="read only the first so many examples of each")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    overrides, rest = split_overrides(argv)
    options = parser.parse_args(rest)
    config = read_config(options.config, overrides)
    sections = {"train": config.data.train, **{name: section.data for name, section in config.eval.items()}}
    if options.split:
        if options.split not in sections:
            raise UserError(f"The config has no evaluator {options.split!r}{did_you_mean(options.split, sections)}")
        sections = {options.split: sections[options.split]}
    results = _inspect_all(sections, config, options.limit)
    errors = sum(finding.severity == "error" for result in results.values() for finding in result.findings)
    if options.json:
        report = {"ok": not errors, "sections": {name: result.to_json() for name, result in results.items()}}
        print(json.dumps(report, indent=1))
    else:
        show(results, Console())
    return 1 if errors else 0


def _inspect_all(sections: dict[str, ConfigDict], config: ConfigDict, limit: int) -> dict[str, Inspection]:
    """Inspects every section; a source that cannot be built becomes a finding of its section."""
    results: dict[str, Inspection] = {}
    threads = config.data.threads or default_threads()
    for name, section in sections.items():
        try:
            with inspecting():
                source = create_source(**section.to_dict())
        except UserError as error:
            results[name] = Inspection(DataInfo(section.name), findings=[Finding("source", "error", str(error))])
            continue
        total = min(limit, len(source)) if limit else len(source)
        with progress_bar(name) as moved:
            results[name] = inspect(
                source,
                limit=limit,
                threads=threads,
                crop=config.data.crop if name == "train" else None,
                progress=lambda done, moved=moved, total=total: moved(done, total),
            )
    train = results.get("train")
    for name, result in results.items():
        if train is None or name == "train":
            continue
        if result.info.classes and train.info.classes and result.info.classes != train.info.classes:
            sentence = f"{name} has other classes than train, so a model trained here cannot be scored on it."
            result.findings.insert(0, Finding("classes_differ", "error", sentence))
        if leak := overlap(train, name, result):
            result.findings.append(leak)
    return results


def show(results: dict[str, Inspection], console: Console) -> None:
    """Prints the report for a person."""
    for name, result in results.items():
        info = result.info
        console.rule(Text(f"{name}: {info.name}", "bold"), align="left")
        if result.examples:
            unread = f", {result.read} read" if result.read != result.examples else ""
            facts = [f"{result.examples} examples{unread}", _sizes(result)]
            if result.objects:
                mean = sum(result.objects) / len(result.objects)
                facts.append(f"{mean:.1f} objects per image, at most {max(result.objects)}")
            console.print("; ".join(fact for fact in facts if fact))
        if result.values:
            console.print(Text(f"values in the masks: {_ranges(result.values)}"))
            console.print(_table(result, narrow=console.width < 60))
        for finding in result.findings:
            color = "red" if finding.severity == "error" else "yellow"
            console.print(Text.assemble((f"{finding.severity}: ", f"bold {color}"), finding.message))
            for file in finding.files[:SHOWN]:
                console.print(Text(f"    {file}"), soft_wrap=True)
            if len(finding.files) > SHOWN:
                console.print(f"    ... and {len(finding.files) - SHOWN} more (--json lists all)")
    errors = sum(finding.severity == "error" for result in results.values() for finding in result.findings)
    warnings = sum(finding.severity == "warning" for result in results.values() for finding in result.findings)
    console.rule()
    verdict = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}."
    console.print(Text(verdict + (" Training would fail or go wrong." if errors else " Ready to train."), "bold"))


def _sizes(result: Inspection) -> str:
    """The one size as height x width, or the range of sizes."""
    sizes = sorted(result.sizes)
    if not sizes:
        return ""
    if len(sizes) == 1:
        return f"all {sizes[0][0]}x{sizes[0][1]} (height x width)"
    heights, widths = zip(*sizes, strict=True)
    return f"{len(sizes)} sizes, height {min(heights)} to {max(heights)}, width {min(widths)} to {max(widths)}"


def _ranges(values) -> str:
    """Ids as ranges (`0..18, 255`), or the most frequent of many colors."""
    ids = sorted(value for value in values if isinstance(value, int))
    parts: list[list[int]] = []
    for value in ids:
        if parts and value == parts[-1][1] + 1:
            parts[-1][1] = value
        else:
            parts.append([value, value])
    shown = [str(low) if low == high else f"{low}..{high}" for low, high in parts]
    colors = sorted((value for value in values if not isinstance(value, int)), key=values.get, reverse=True)
    shown = shown[:24] + ([f"... ({len(ids)} ids)"] if len(shown) > 24 else [])
    shown += [str(color) for color in colors[:12]] + ([f"... ({len(colors)} colors)"] if len(colors) > 12 else [])
    return ", ".join(shown)


def _table(result: Inspection, narrow: bool) -> Table:
    """Pixels and files per class; numbers are never cut, long names are folded."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("label", "share", "files") if narrow else ("label", "share", "files", "pixels"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("class", overflow="fold")
    labelled = max(1, sum(result.class_pixels))
    palette = result.info.palette or ((128, 128, 128),) * len(result.info.classes)
    rows = zip(result.info.classes, palette, result.class_pixels, result.class_files, strict=True)
    for label, (name, color, pixels, files) in enumerate(rows):
        numbers = [str(label), f"{100 * pixels / labelled:.2f} %", str(files), f"{pixels:,}"][: 3 if narrow else 4]
        square = ("\N{BLACK SQUARE} ", f"rgb({color[0]},{color[1]},{color[2]})")
        table.add_row(*numbers, Text.assemble(square, (name, "" if files else "yellow")))
    if result.ignored:
        numbers = ["255", "", "", f"{result.ignored:,}"][: 3 if narrow else 4]
        table.add_row(*numbers, "(ignored)")
    return table


def run() -> None:
    """The console entry point."""
    run_command(main)


if __name__ == "__main__":
    run()
