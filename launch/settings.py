"""What is launched and where: one file of `KEY=value` lines, which a shell could source too."""

import secrets
import shlex
import time
from pathlib import Path

from jax_densevit.errors import UserError, check_name

# Every key with its default; None where there is none and the backend must be told.
CLOUD = {"PROJECT": None, "ZONE": None, "NAME": None, "BUCKET": None, "PRICE_PER_CHIP_HOUR": ""}
COMMON = {"BACKEND": None, "RUN_ID": "", "CONFIG": None, "ARGS": ""}
BACKENDS = {
    "tpu_vm": {**CLOUD, "TYPE": None, "RUNTIME": None, "SPOT": "no", "SLICES": "1"},
    "gce": {
        **CLOUD,
        "MACHINE": None,  # e.g. ct6e-standard-4t
        "TOPOLOGY": None,  # chips, e.g. 4x4
        "SPOT": "no",
        "IMAGE_FAMILY": "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e",
        "IMAGE_PROJECT": "ubuntu-os-accelerator-images",
        "DISK_GB": "200",
    },
    "gke": {
        **CLOUD,
        "ACCELERATOR": None,  # e.g. tpu-v6e-slice
        "TOPOLOGY": None,
        "CHIPS_PER_HOST": "4",
        "SPOT": "no",
        "IMAGE": None,  # where the container goes, e.g. us-docker.pkg.dev/PROJECT/densevit/train:1
        "RESTARTS": "20",
    },
    "slurm": {
        "RUNS": None,  # a folder that all nodes see
        "NODES": "1",
        "TASKS_PER_NODE": "1",
        "GPUS_PER_NODE": "8",
        "TIME": "24:00:00",
        "SBATCH_ARGS": "",  # e.g. --partition=long --account=me
        "RESTARTS": "20",
    },
    "local": {"RUNS": "runs", "PROCESSES": "4"},
}
DEFAULT_FILE = "launch.env"


def read_settings(path: str | Path) -> dict[str, str]:
    """The settings in a file, defaults filled in.

    Raises:
      UserError: no such file, a line that is no `KEY=value`, a key or backend that does not exist, or a
        key that is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no settings file {path}; copy launch/env.example to {DEFAULT_FILE} and fill it in.")
    given = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; put values with spaces in quotes.") from error
        if not words:
            continue
        key, equals, value = words[0].partition("=")
        if not equals or len(words) > 1:
            raise UserError(f"{path}, line {number}: expected KEY=value; put values with spaces in quotes.")
        given[key] = value
    check_name("launch backend", given.get("BACKEND", ""), BACKENDS)
    known = {**COMMON, **BACKENDS[given["BACKEND"]]}
    for key in given:
        check_name(f"setting of the backend {given['BACKEND']}", key, known)
    missing = [key for key, default in known.items() if default is None and not given.get(key)]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; launch/env.example says what they mean.")
    settings = {key: given.get(key) or default or "" for key, default in known.items()}
    if "/" in settings["RUN_ID"] or settings["RUN_ID"].startswith((".", "-")):
        raise UserError(
            f"{path}: RUN_ID {settings['RUN_ID']!r} becomes the name of a folder; leave out '/', a first '.' or '-'."
        )
    for key in ("SLICES", "CHIPS_PER_HOST", "NODES", "TASKS_PER_NODE", "GPUS_PER_NODE", "PROCESSES", "RESTARTS"):
        if key in settings and not settings[key].isdecimal():
            raise UserError(f"{path}: {key}={settings[key]!r} must be a whole number.")
    return settings


def ensure_run_id(settings: dict[str, str], path: str | Path) -> bool:
    """Gives a run without a name one, and writes it into the file: the same RUN_ID resumes. Whether it did."""
    if settings["RUN_ID"]:
        return False
    settings["RUN_ID"] = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"\nRUN_ID={settings['RUN_ID']}\n")
    return True
