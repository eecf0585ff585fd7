"""TPU VMs (v2 to v6e) through queued resources: `gcloud compute tpus queued-resources`, `... tpu-vm ssh`.

Google has put this interface into maintenance; TPU7x and later need the backends gce or gke.
"""

from launch.backend import Machines
from launch.cloud import SCOPES, CloudHosts
from launch.shell import CommandFailed

# https://cloud.google.com/tpu/docs/queued-resources and the API's QueuedResourceState.State
REQUEST = {
    "CREATING": Machines.WAITING,
    "ACCEPTED": Machines.WAITING,
    "WAITING_FOR_RESOURCES": Machines.WAITING,
    "PROVISIONING": Machines.WAITING,
    "DELETING": Machines.WAITING,
    "SUSPENDING": Machines.WAITING,
    "SUSPENDED": Machines.LOST,
    "FAILED": Machines.LOST,
    "ACTIVE": Machines.READY,
}
# The API's Node.State; a node that somebody stopped is nobody's business but theirs.
NODE = {
    "CREATING": Machines.WAITING,
    "STARTING": Machines.WAITING,
    "RESTARTING": Machines.WAITING,
    "REIMAGING": Machines.WAITING,
    "REPAIRING": Machines.WAITING,
    "READY": Machines.READY,
    "PREEMPTED": Machines.LOST,
    "TERMINATED": Machines.LOST,
}


class TpuVm(CloudHosts):
    """One slice, or SLICES of them."""

    @property
    def nodes(self) -> list[str]:
        """The names of the slices."""
        name, slices = self.settings["NAME"], int(self.settings["SLICES"])
        return [name] if slices == 1 else [f"{name}-{number}" for number in range(slices)]

    def reach(self, script: str) -> list[tuple[str, ...]]:
        """One ssh a slice, to all of its workers."""
        command = ("gcloud", "compute", "tpus", "tpu-vm", "ssh")
        return [(*command, node, *self.place, "--worker=all", f"--command={script}", "--quiet") for node in self.nodes]

    def create(self) -> None:
        """Queues a request."""
        settings = self.settings
        several = int(settings["SLICES"]) > 1
        names = (f"--node-count={settings['SLICES']}", f"--node-prefix={settings['NAME']}")
        self.shell.run(
            *("gcloud", "compute", "tpus", "queued-resources", "create", settings["NAME"], *self.place),
            *(names if several else (f"--node-id={settings['NAME']}",)),
            f"--accelerator-type={settings['TYPE']}",
            f"--runtime-version={settings['RUNTIME']}",
            f"--scopes={SCOPES}",
            *(("--spot",) if settings["SPOT"] == "yes" else ()),
        )

    def machines(self) -> Machines:
        """The state of the request, then that of its nodes: a preempted node's request may still be called active."""
        try:
            request = self.describe("compute", "tpus", "queued-resources", "describe", self.settings["NAME"])
            if request is None:
                return Machines.ABSENT
            state = REQUEST.get(request["state"]["state"], Machines.UNKNOWN)
            if state != Machines.READY:
                return state
            found = [self.describe("compute", "tpus", "tpu-vm", "describe", node) for node in self.nodes]
            states = {Machines.LOST if node is None else NODE.get(node["state"], Machines.UNKNOWN) for node in found}
        except (CommandFailed, LookupError, TypeError):
            return Machines.UNKNOWN
        for state in (Machines.UNKNOWN, Machines.LOST, Machines.WAITING):
            if state in states:
                return state
        return Machines.READY

    def delete(self) -> None:
        """The request and its nodes."""
        command = ("gcloud", "compute", "tpus", "queued-resources", "delete", self.settings["NAME"])
        try:
            self.shell.run(*command, *self.place, "--force", "--quiet")
        except CommandFailed as error:
            if "NOT_FOUND" not in error.said:
                raise

    def ssh(self) -> int:
        """Worker 0 of the first slice."""
        command = ("gcloud", "compute", "tpus", "tpu-vm", "ssh", self.nodes[0])
        return self.shell.attach(*command, *self.place, "--worker=0")
