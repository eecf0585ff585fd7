"""TPU slices (v5p, v6e, TPU7x) as managed instance groups of Compute Engine.

A workload policy names the slice's topology, an instance template the machine, and a group in bulk mode brings all
hosts of the slice at once or none: https://cloud.google.com/tpu/docs/tpus-and-migs
"""

from launch.backend import Machines, chips
from launch.cloud import SCOPES, CloudHosts
from launch.shell import CommandFailed

# Of the API's ManagedInstance: instanceStatus, and currentAction where there is no instance yet or any more.
COMING = {"CREATING", "CREATING_WITHOUT_RETRIES", "RECREATING", "RESTARTING", "REFRESHING", "VERIFYING"}
WAITING = {"PENDING", "PROVISIONING", "STAGING", "REPAIRING"}
LOST = {"STOPPING", "TERMINATED", "SUSPENDED", "SUSPENDING", "DEPROVISIONING"}


class Gce(CloudHosts):
    """One slice. Its policy, template and group bear the same name."""

    _seen = False  # whether the slice was there while this program looked

    def _hosts(self) -> int:
        per_host = self.settings["MACHINE"].rpartition("-")[2].rstrip("t")  # ct6e-standard-4t: four chips
        return max(1, (chips(self.settings) or 1) // int(per_host if per_host.isdecimal() else 4))

    def _instances(self) -> list[dict] | None:
        return self.describe("compute", "instance-groups", "managed", "list-instances", self.settings["NAME"])

    def reach(self, script: str) -> list[tuple[str, ...]]:
        """One ssh an instance."""
        names = [f"{self.settings['NAME']}-HOST"]
        if not self.shell.dry_run:
            names = sorted(one["instance"].rpartition("/")[2] for one in self._instances() or [])
        return [("gcloud", "compute", "ssh", name, *self.place, f"--command={script}", "--quiet") for name in names]

    def create(self) -> None:
        """Policy and template, kept when they are there already, then the group."""
        settings, project = self.settings, f"--project={self.settings['PROJECT']}"
        name, count = settings["NAME"], self._hosts()
        policy = f"projects/{settings['PROJECT']}/regions/{self.region}/resourcePolicies/{name}"
        several = count > 1  # the machine says it all where the slice is one host
        if several:
            self._unless_there(
                *("gcloud", "compute", "resource-policies", "create", "workload-policy", name, project),
                *(
                    f"--region={self.region}",
                    "--type=HIGH_THROUGHPUT",
                    f"--accelerator-topology={settings['TOPOLOGY']}",
                ),
            )
        spot = ("--provisioning-model=SPOT", "--instance-termination-action=DELETE")
        self._unless_there(
            *("gcloud", "compute", "instance-templates", "create", name, project),
            f"--machine-type={settings['MACHINE']}",
            f"--image-family={settings['IMAGE_FAMILY']}",
            f"--image-project={settings['IMAGE_PROJECT']}",
            f"--boot-disk-size={settings['DISK_GB']}GB",
            "--maintenance-policy=TERMINATE",
            f"--scopes={SCOPES}",
            *(spot if settings["SPOT"] == "yes" else ()),
        )
        self.shell.run(
            *("gcloud", "compute", "instance-groups", "managed", "create", name, *self.place),
            f"--template={name}",
            f"--size={count}",
            "--target-size-policy-mode=bulk",
            "--default-action-on-vm-failure=do-nothing",
            *((f"--workload-policy={policy}",) if several else ()),
        )

    def _unless_there(self, *command: str) -> None:
        try:
            self.shell.run(*command)
        except CommandFailed as error:
            if "already exists" not in error.said:
                raise

    def machines(self) -> Machines:
        """From what the group says about its instances."""
        try:
            found = self._instances()
            if found is None:
                return Machines.ABSENT
            states = {one.get("instanceStatus") or _without_instance(one) for one in found}
        except (CommandFailed, AttributeError, TypeError):
            return Machines.UNKNOWN
        if not states <= {*WAITING, *LOST, "RUNNING"}:
            return Machines.UNKNOWN
        if states & LOST:
            return Machines.LOST
        if states == {"RUNNING"} and len(found) == self._hosts():
            self._seen = True
            return Machines.READY
        # A slice comes all at once: fewer hosts than that, once it was there, will not be more again.
        return Machines.LOST if self._seen and len(found) < self._hosts() else Machines.WAITING

    def delete(self) -> None:
        """The group with its instances, then template and policy, which cost nothing but would keep old settings."""
        name, project = self.settings["NAME"], f"--project={self.settings['PROJECT']}"
        commands = [
            ("gcloud", "compute", "instance-groups", "managed", "delete", name, *self.place, "--quiet"),
            ("gcloud", "compute", "instance-templates", "delete", name, project, "--quiet"),
        ]
        if self._hosts() > 1:
            region = f"--region={self.region}"
            commands.append(("gcloud", "compute", "resource-policies", "delete", name, project, region, "--quiet"))
        for command in commands:
            try:
                self.shell.run(*command)
            except CommandFailed as error:
                if "was not found" not in error.said and "NOT_FOUND" not in error.said:
                    raise

    def ssh(self) -> int:
        """The first instance by name."""
        first = self.reach("")[0][3]
        return self.shell.attach("gcloud", "compute", "ssh", first, *self.place)


def _without_instance(managed: dict) -> str:
    action = managed.get("currentAction", "CREATING")
    if action in COMING:
        return "PENDING"
    return "TERMINATED" if action in ("NONE", "DELETING", "ABANDONING") else action
