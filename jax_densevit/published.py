"""Published weights as a trained model: from a weight file or a workdir in one line, and from a file to a workdir."""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_densevit import experiment
from jax_densevit.configuration import check_config, read_config
from jax_densevit.data.source import DataInfo
from jax_densevit.data.sources.registry import source_facts
from jax_densevit.errors import UserError, check_name
from jax_densevit.models import create_model
from jax_densevit.pretrained import SOURCES, Report, check, convert, read
from jax_densevit.tasks.task import Task
from jax_densevit.training.checkpoint import Checkpoints
from jax_densevit.training.state import TrainState
from jax_densevit.training.stored import local_folder

STEP = 0  # of a checkpoint that no training of ours has made


@dataclasses.dataclass(frozen=True)
class Published:
    """A weight file that has become a model of ours.

    Attributes:
      model, variables, task, info, config: as in `experiment.Loaded`, the variables as NumPy arrays.
      report: how the file fitted.
      origin: where the weights come from, JSON-ready: source, path, SHA-256 of every file, what was left out.
    """

    model: Any
    variables: dict[str, Any]
    task: Task | None
    info: DataInfo
    config: ConfigDict | None
    report: Report
    origin: dict[str, Any]

    def meta(self) -> dict[str, Any]:
        """What its checkpoint says about itself, as `experiment.Experiment.meta`, and the origin. JSON-ready."""
        return {
            "config": self.config.to_dict(),
            "info": self.info.to_json(),
            "model_options": experiment.model_options(self.config, self.task),
            "versions": experiment.versions(),
            "origin": self.origin,
        }


def load(
    path: str | Path,
    *,
    step: int | None = None,
    which: str = "best",
    decode: dict[str, Any] | None = None,
    mesh: Mesh | None = None,
    source: str = "",
    config: str | ConfigDict | None = None,
    model: str = "",
    leave_out: Sequence[str] = (),
    **options: Any,
) -> experiment.Loaded:
    """A trained model with its preprocessing, from a workdir or from a published weight file.

    `load("runs/mine")` for a workdir that training or `convert` wrote; for a weight file its source, and what it is of:
    `load("pup.pth", source="setr", config="configs/setr/cityscapes.py")`, which also knows task, classes and decoding,
    or a model alone: `load("L_16.npz", source="vit_npz", model="vit", variant="L/16", image_size=384)`.

    Args:
      path: a workdir, or a weight file as in `pretrained.read`.
      step, which, decode, mesh: see `experiment.load`; the first two only for workdirs.
      source: of a weight file, a name of `pretrained.SOURCES`.
      config: of a weight file: a config file (`file.py:arg`), or a config.
      model: in place of a config, a registered model; **options are its variant and fields.
      leave_out: see `pretrained.convert`.

    Returns:
      `Loaded`; images are normalised as the published model was trained, see `open_weights`.

    Raises:
      UserError: no intact checkpoint, a file that does not fit (never random weights unasked), options that contradict.
    """
    if not source:
        if not Path(path).is_dir() and Path(path).exists():
            raise UserError(f"{path} is a file: say its source (one of {', '.join(SOURCES)}) and its config or model.")
        if config is not None or model or leave_out or options:
            raise UserError("config, model and what belongs to them are for weight files, with their source.")
        return experiment.load(path, step=step, which=which, decode=decode, mesh=mesh)
    if step is not None or which != "best":
        raise UserError("step and which are for workdirs; a weight file has one set of weights.")
    found = open_weights(path, source, config, model=model, leave_out=leave_out, decode=decode, **options)
    return experiment.make_ready(found.model, found.variables, found.task, found.info, found.config, STEP, mesh)


def open_weights(
    path: str | Path,
    source: str,
    config: str | ConfigDict | None = None,
    *,
    model: str = "",
    leave_out: Sequence[str] = (),
    pos_rule: str | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    decode: dict[str, Any] | None = None,
    **options: Any,
) -> Published:
    """Reads a weight file and converts it to the model of a config, or to a model named alone.

    The data of the config need not be there, as long as its source's facts are known without (classes of the public
    sets, those that the config itself names).

    Images are normalised as `mean` and `std` say; without them a complete model as its source's models were trained
    (`Source.normalisation`), and one with parts that are drawn anew, which will be trained, as the config's data says.

    Args:
      path, source, config, model, options, leave_out, decode: see `load`.
      pos_rule: see `pretrained.convert`.
      mean, std: per channel, or one number for all, of images in [0, 1].
    """
    check_name("source of weights", source, SOURCES)
    if (config is None) == (not model):
        raise UserError("Say either the config or the model that the weights are for.")
    task = None
    if config is not None:
        if options:
            raise UserError(f"{', '.join(options)}: options of the model belong into its config.")
        config = read_config(config) if isinstance(config, str) else config
        check_config(config)
        info = _facts(config)
        task = experiment.make_task(config, info, decode)
        options = experiment.model_options(config, task)
    else:
        info, options = DataInfo(Path(path).stem), {"name": model, **options}
    module = create_model(**options)
    tensors = read(path)
    report = check(tensors, source, module, leave_out=leave_out, pos_rule=pos_rule)
    variables = convert(tensors, source, module, leave_out=leave_out, pos_rule=pos_rule)
    info = _normalised(info, source, report, mean, std)
    if config is not None:
        task = experiment.make_task(config, info, decode)
    origin = {
        "source": source,
        "weights": str(Path(path).absolute()),
        "sha256": _digests(Path(path)),
        "leave_out": list(leave_out),
        "report": str(report),
    }
    return Published(module, variables, task, info, config, report, origin)


def save(published: Published, workdir: str | Path) -> None:
    """Writes a workdir with one checkpoint of it, at step 0: what evaluation, prediction and `config.init` take.

    Raises:
      UserError: there is something in `workdir` already, or it cannot be written; then nothing is left behind.
    """
    workdir = local_folder(workdir)
    check_empty(workdir)
    part = workdir.with_name(f".{workdir.name}.{os.getpid()}.part")
    variables = published.variables
    state = TrainState(np.int32(STEP), variables["params"], variables.get("batch_stats", {}), None, {})
    try:
        with Checkpoints(part) as checkpoints:
            checkpoints.save(STEP, state, {}, json.loads(json.dumps(published.meta())))
        os.replace(part, workdir)
    except OSError as error:
        raise UserError(f"{workdir} cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_empty(workdir: str | Path) -> None:
    """Raises :class:`UserError` unless `workdir` is an empty folder, or not there."""
    with contextlib.suppress(FileNotFoundError):
        try:
            if next(Path(workdir).iterdir(), None) is not None:
                raise UserError(f"There is something in {workdir} already; choose another --workdir.")
        except NotADirectoryError as error:
            raise UserError(f"{workdir} is a file; choose another --workdir.") from error


def _facts(config: ConfigDict) -> DataInfo:
    options = config.data.train.to_dict()
    try:
        return source_facts(options.pop("name"), **options)
    except UserError as error:
        raise UserError(
            f"What classes the model has, and how images are normalised, says config.data.train, and it cannot: {error}"
        ) from error


def _normalised(info: DataInfo, source: str, report: Report, mean: Sequence[float], std: Sequence[float]) -> DataInfo:
    if not mean and not std:
        own = SOURCES[source].normalisation
        if report.drawn or own is None:
            return info
        return dataclasses.replace(info, mean=own[0], std=own[1])
    values = [tuple(map(float, given)) * (3 if len(given) == 1 else 1) for given in (mean, std)]
    if [len(value) for value in values] != [3, 3] or min(values[1]) <= 0:
        raise UserError(f"mean {tuple(mean)} and std {tuple(std)} must be three numbers each, or one; std above 0.")
    return dataclasses.replace(info, mean=values[0], std=values[1])


def _digests(path: Path) -> dict[str, str]:
    """SHA-256, hex, of the file, of all files of a TensorFlow checkpoint, or of a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    elif path.suffix == ".index" or not path.exists():
        prefix = path.name.removesuffix(".index")
        files = sorted(file for file in path.parent.glob(f"{glob.escape(prefix)}.*") if file.is_file())
    else:
        files = [path]
    digests = {}
    for file in files:
        with open(file, "rb") as content:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            digests[name] = hashlib.file_digest(content, "sha256").hexdigest()
    return digests
