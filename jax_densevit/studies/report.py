"""The report of a study: a Markdown file with a table per task, curves and pictures beside it, all numbers in JSON."""

import datetime
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jax_densevit.data.source import DataInfo
from jax_densevit.studies import curves
from jax_densevit.studies.plan import Plan
from jax_densevit.studies.run import read_examples, read_result
from jax_densevit.tasks import color_pictures, pictures
from jax_densevit.training.checkpoint import Checkpoints
from jax_densevit.writing import whole_file, write_json, write_picture

# Per kind of task: (title, key of the test scores, format), in the order of the columns.
SCORES = {
    "segmentation": (("Top-1", "pixel_accuracy", "{:.1%}"), ("mIoU", "mIoU", "{:.1%}")),
    "colorization": (
        ("L1", "L1", "{:.4f}"),
        ("Charbonnier", "charbonnier", "{:.4f}"),
        ("PSNR, dB", "PSNR", "{:.2f}"),
        ("CIEDE2000", "CIEDE2000", "{:.2f}"),
        ("Colorfulness, minus true", "delta_colorfulness", "{:+.1f}"),
    ),
}
NOTHING = "–"


def write_report(study: ConfigDict, plans: list[Plan], workdir: Path, command: str) -> Path:
    """Writes `report.md`, `results.json` and the pictures of what is done so far; returns the report's path."""
    done = [(plan, read_result(workdir / plan.task / plan.model)) for plan in plans]
    sections = [_head(study, plans, command)]
    waiting = [f"{plan.title} ({plan.task})" for plan, result in done if result is None]
    if waiting:
        sections.append(f"**Not finished:** {', '.join(waiting)} not yet trained and measured.")
    for task in dict.fromkeys(plan.task for plan in plans):
        found = [(plan, result) for plan, result in done if plan.task == task and result is not None]
        if found:
            sections.append(_section(task, found, workdir))
    sections.append(_reading())
    values = {
        "date": _now(),
        "command": command,
        "study": study.to_dict(),
        "results": [result for _, result in done if result is not None],
        "not_finished": waiting,
    }
    write_json(workdir / "results.json", values)
    path = workdir / "report.md"
    with whole_file(path) as part:
        part.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def score_table(results: list[dict[str, Any]]) -> str:
    """The table of one task, Markdown: a row per model, then one per trivial answer."""
    scores = SCORES[results[0]["kind"]]
    columns = ["Model", "# of Parameters", "Training Loss", "Validation Loss"]
    columns += [f"Test {title}" for title, _, _ in scores]
    columns += [
        "GMACs",
        "Steps",
        "Best Step",
        "Learning Rate",
        "Wall Time, Training",
        "Images/s, Training",
        "Images/s, Inference",
    ]
    rows = []
    for r in results:
        rows.append(
            [
                r["title"],
                f"{r['parameters']:,}",
                f"{r['training_loss']:.4f}",
                f"{r['validation_loss']:.4f}",
                *(_number(r["test"].get(key), form) for _, key, form in scores),
                _short(r["gmacs"]),
                f"{r['steps']:,}",
                f"{r['step']:,}",
                f"{r['learning_rate']:g}",
                _duration(r["training_seconds"]),
                _short(r["training_images_per_second"]),
                _short(r["inference_images_per_second"]),
            ]
        )
    first = results[0]
    for name, numbers in first["baselines"].items():
        # On 8-bit pictures, the gray input's score is its loss.
        same = first["validation_baselines"].get(name, {}).get({"l1": "L1"}.get(first["loss"], first["loss"]))
        cells = [f"*{name}*", "0", NOTHING, _number(same, "{:.4f}")]
        cells += [_number(numbers.get(key), form) for _, key, form in scores]
        rows.append(cells + [NOTHING] * (len(columns) - len(cells)))
    return _table(columns, rows)


def probe_table(results: list[dict[str, Any]]) -> str:
    """What every rate scored in its probe, the chosen one in bold."""
    rates = sorted({probe["learning_rate"] for result in results for probe in result["probes"]})
    rows = []
    for result in results:
        found = {probe["learning_rate"]: probe["score"] for probe in result["probes"]}
        cells = [_number(found.get(rate), "{:.4f}") if found.get(rate) is not None else "diverged" for rate in rates]
        cells = [f"**{c}**" if rate == result["learning_rate"] else c for rate, c in zip(rates, cells, strict=True)]
        rows.append([result["title"], f"{result['probe_steps']:,}", *cells])
    return _table(["Model", "Steps", *(f"{rate:g}" for rate in rates)], rows)


def _head(study: ConfigDict, plans: list[Plan], command: str) -> str:
    terms = []
    for task in dict.fromkeys(plan.task for plan in plans):
        of_task = [plan for plan in plans if plan.task == task]
        config = of_task[0].config
        crop = "x".join(map(str, config.data.crop)) if all(config.data.crop) else "whole pictures"
        steps = {plan.config.steps for plan in of_task}
        budget = f"{steps.pop():,} steps" if len(steps) == 1 else f"{of_task[0].flops:.3g} FLOPs of training"
        optimizer = config.optimizer
        ema = f", evaluated with the moving average of the parameters (decay {config.ema:g})" if config.ema else ""
        terms.append(
            f"- **{task}** on `{config.data.train.name}`: crops of {crop}, {budget} for every model, batches of "
            f"{config.batch_size}, seed {config.seed}; {optimizer.name}, {optimizer.schedule} schedule, "
            f"{optimizer.warmup_steps / config.steps:.0%} warm-up, weight decay {optimizer.weight_decay:g}, gradients "
            f"clipped at {optimizer.clip_norm:g}{ema}; the best step by `{config.checkpoint.best}`."
        )
    rates = ", ".join(f"{rate:g}" for rate in plans[0].rates)
    if len(plans[0].rates) > 1:
        chosen = f"chosen for each model on validation among {rates}, after probes of {study.probe:.0%} of its steps"
    else:
        chosen = f"{rates} for all models"
    return "\n".join(
        [
            "# Study\n",
            f"Made by `{command}`, {_now()}.\n",
            "For all models of a task the same crops in the same order, the same batches, budget, optimizer and "
            f"schedule; the learning rate is {chosen}. All start from random parameters.\n",
            *terms,
        ]
    )


def _section(task: str, found: list[tuple[Plan, dict[str, Any]]], workdir: Path) -> str:
    results = [result for _, result in found]
    first = results[0]
    folders = {plan.title: workdir / plan.task / plan.model for plan, _ in found}
    best = found[0][0].config.checkpoint.best.removeprefix("-").partition("/")[2]
    runs = {title: curves.read_run(folder / "run", "val", best) for title, folder in folders.items()}
    with whole_file(workdir / f"{task}_curves.png") as part:
        curves.picture(runs, best).savefig(part, dpi=110)
    write_picture(workdir / f"{task}_sheet.png", _sheet(first["kind"], folders))
    devices = " and ".join(sorted({result["facts"]["device"] for result in results}))
    same = "; ".join(
        f"{r['title']} {r['parameters_as_published']:,}"
        for r in results
        if r["parameters_as_published"] != r["parameters"]
    )
    lines = [
        f"## {task.capitalize()}\n",
        score_table(results),
        "",
        f"Losses: {first['loss'].replace('_', '-')}, in evaluation mode, of the best step: over "
        f"{first['training_loss_examples']:,} crops of the training order, and over all "
        f"{first['validation_examples']:,} validation examples. Scores: of that step, on {first['test_examples']:,} "
        "test examples, measured once. GMACs: 1e9 multiply-accumulates of one forward pass of a training crop. "
        "Wall time: of the steps of the full run alone, without compiling, evaluating and probes; on "
        f"{devices}. Inference: batches as in training, on one device."
        + (f" Parameters as published, with unused ones: {same}." if same else ""),
    ]
    if first["probes"]:
        low, high = min(found[0][0].rates), max(found[0][0].rates)
        edge = [r["title"] for r in results if r["learning_rate"] in (low, high)]
        lines += ["", f"Learning rates, by `{best}` on the validation split after a probe:\n", probe_table(results)]
        if edge:
            lines += ["", f"At an end of the grid, so a rate beyond it may be better: {', '.join(edge)}."]
    lines += ["", f"![Learning curves]({task}_curves.png)", "", f"![Test examples]({task}_sheet.png)"]
    return "\n".join(lines)


def _sheet(kind: str, folders: dict[str, Path]) -> Any:
    """One column per model, between what it is given and the truth."""
    examples = {title: read_examples(folder) for title, folder in folders.items()}
    first = next(iter(examples.values()))
    if kind == "segmentation":
        checkpoints = Checkpoints(next(iter(folders.values())) / "run", read_only=True)
        info = DataInfo.from_json(checkpoints.read_meta(checkpoints.preferred_step())["info"])
        answers = {title: [row["predicted_labels"] for row in rows] for title, rows in examples.items()}
        return pictures.comparison(first, answers, info)
    rows = []
    for i, example in enumerate(first):
        answers = {title: rows_[i]["predicted_image"] for title, rows_ in examples.items()}
        rows.append({"gray": example["predicted_gray"], **answers, "truth": example["image"], "name": example["name"]})
    return color_pictures.sheet(rows)


def _reading() -> str:
    return (
        "## What this does not show\n\n"
        "One seed: differences that another seed would turn round are not told from others. Models trained from random "
        "parameters for this budget: what they reach with pretraining or with more data and time is another question. "
        "Every model has its published or stated size, so a row compares a model of that size, not an idea alone; the "
        "columns of parameters, GMACs and time say at what cost."
    )


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None or value != value else form.format(value)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
