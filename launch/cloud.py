"""What both kinds of cloud machines share: the bucket, the code's way to the hosts, reading answers as JSON."""

import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

from launch.backend import cost_of_chips
from launch.hosts import Hosts
from launch.shell import CommandFailed

ROOT = Path(__file__).resolve().parents[1]
SCOPES = "https://www.googleapis.com/auth/cloud-platform"


class CloudHosts(Hosts):
    """TPU hosts in Google's cloud."""

    extra = "tpu"

    @property
    def place(self) -> tuple[str, str]:
        """The flags that say in which project and zone."""
        return f"--project={self.settings['PROJECT']}", f"--zone={self.settings['ZONE']}"

    @property
    def region(self) -> str:
        """The region of the zone: `us-east5` of `us-east5-b`."""
        return self.settings["ZONE"].rpartition("-")[0]

    def cost(self) -> str:
        """Chips and money."""
        return cost_of_chips(self.settings)

    def setup(self) -> None:
        """The commit of this checkout goes through the bucket; every host unpacks it and runs `host/setup.sh`."""
        commit = self.shell.read("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD").strip() or "COMMIT"
        if self.shell.read("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no").strip():
            print(f"There are uncommitted changes: the hosts get commit {commit} without them.")
        address = f"gs://{self.settings['BUCKET']}/code/{commit}.tar.gz"
        with tempfile.TemporaryDirectory() as folder:
            archive = f"{folder}/{commit}.tar.gz"
            self.shell.run("git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={archive}", "HEAD")
            self.shell.run("gcloud", "storage", "cp", archive, address, tries=3)
        new = '"$HOME"/densevit/code.new'
        unpack = [
            "set -e",
            f"rm -rf {new}",
            f"mkdir -p {new}",
            f"gcloud storage cat {shlex.quote(address)} | tar -xz -C {new}",
            f"echo {commit} >{new}/COMMIT",
            f"rm -rf {self.code}",
            f"mv {new} {self.code}",
            f"bash {self.code}/launch/host/setup.sh {shlex.quote(self.settings['BUCKET'])} {self.extra}",
        ]
        self.everywhere("\n".join(unpack), tries=3)

    def describe(self, *command: str) -> dict[str, Any] | list | None:
        """The JSON answer of a gcloud command; None where the thing does not exist.

        Raises:
          CommandFailed: any other failure, or an answer that is no JSON.
        """
        command = ("gcloud", *command, *self.place, "--format=json")
        try:
            answer = self.shell.read(*command)
        except CommandFailed as error:
            if "NOT_FOUND" in error.said or "was not found" in error.said:
                return None
            raise
        try:
            return json.loads(answer)
        except ValueError as error:
            raise CommandFailed(command, 0, f"the answer is no JSON: {answer[:100]}") from error
