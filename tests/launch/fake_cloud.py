"""A cloud made of one shell script: programs in PATH that record their calls and play states."""

import json
from pathlib import Path

PROGRAMS = (
    "gcloud kubectl docker sbatch squeue sacct scancel scontrol srun sudo curl gcsfuse mountpoint python3 lsb_release"
)
SCRIPT = Path(__file__).with_name("fake_program.sh")


class FakeCloud:
    """Programs in `folder/bin`; `folder/home` is the home of every host, when :meth:`hosts` made it."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder = folder
        for name in ("bin", "rules", "bucket"):
            (folder / name).mkdir(parents=True)
        for program in PROGRAMS.split():
            copy = folder / "bin" / program
            copy.write_text(SCRIPT.read_text())
            copy.chmod(0o755)
        self._count = 0
        monkeypatch.setenv("FAKE", str(folder))
        monkeypatch.setenv("PATH", f"{folder / 'bin'}", prepend=":")

    def play(self, pattern: str, *answers: str, code: int = 0) -> None:
        """Calls that match get these answers one after another, then the last one for ever; earlier plays first."""
        for number, answer in enumerate(answers):
            self._count += 1
            once = "" if number == len(answers) - 1 else ".once"
            rule = self.folder / "rules" / f"{self._count:04d}{once}"
            rule.write_text(f"{pattern}\n{code}\n{answer}\n")

    def once(self, pattern: str, answer: str = "", code: int = 0) -> None:
        """One call that matches gets this answer."""
        self._count += 1
        (self.folder / "rules" / f"{self._count:04d}.once").write_text(f"{pattern}\n{code}\n{answer}\n")

    def hosts(self, python: str = "#!/bin/bash\nexit 0\n") -> Path:
        """Scripts sent by ssh are really run, in this home folder; `python` is what the virtual environment has."""
        (self.folder / "home").mkdir()
        file = self.folder / "host_python"
        file.write_text(python)
        file.chmod(0o755)
        return self.folder / "home"

    def calls(self, word: str = "") -> list[str]:
        """The calls so far that have a word in them."""
        file = self.folder / "calls"
        return [line for line in (file.read_text().splitlines() if file.exists() else []) if word in line]


def request(state: str) -> str:
    """A queued resource as gcloud describes it."""
    return json.dumps({"name": "x", "state": {"state": state}})


SETTINGS = {
    "tpu_vm": {"TYPE": "v6e-16", "RUNTIME": "v2-alpha-tpuv6e", "SPOT": "yes", "PRICE_PER_CHIP_HOUR": "2.70"},
    "gce": {"MACHINE": "ct6e-standard-4t", "TOPOLOGY": "4x4", "SPOT": "yes"},
    "gke": {"ACCELERATOR": "tpu-v6e-slice", "TOPOLOGY": "4x4", "IMAGE": "pkg.dev/p/train:1", "SPOT": "yes"},
    "slurm": {"NODES": "2", "SBATCH_ARGS": "--partition=long"},
    "local": {"PROCESSES": "2"},
}
CLOUD = {
    "PROJECT": "my-project",
    "ZONE": "us-east5-b",
    "NAME": "dense",
    "BUCKET": "my-bucket",
    "PRICE_PER_CHIP_HOUR": "2.70",
}


def write_settings(folder: Path, backend: str, **changes: str) -> Path:
    """A settings file of a backend; `RUN_ID` and `CONFIG` have spaces in them."""
    values = {
        "BACKEND": backend,
        "CONFIG": "configs/my config.py:quick",
        "RUN_ID": "my run",
        "ARGS": "--config.steps=4",
    }
    values |= CLOUD if backend in ("tpu_vm", "gce", "gke") else {"RUNS": str(folder / "all runs")}
    values |= SETTINGS[backend] | changes
    file = folder / "launch.env"
    file.write_text("".join(f"{key}='{value}'\n" for key, value in values.items()))
    return file
