"""GKE: a JobSet of one pod a host. The cluster (Autopilot) brings and removes TPU nodes as pods need them."""

import json
import shlex
from pathlib import Path

from launch.backend import Backend, Job, Machines, State, chips, cost_of_chips, train_words
from launch.shell import CommandFailed

ROOT = Path(__file__).resolve().parents[1]
JOBSET = "https://github.com/kubernetes-sigs/jobset/releases/download/v0.8.2/manifests.yaml"


class Gke(Backend):
    """NAME is the cluster's and the JobSet's."""

    self_restarting = True

    @property
    def _cluster(self) -> tuple[str, ...]:
        settings = self.settings
        return settings["NAME"], f"--location={settings['ZONE'].rpartition('-')[0]}", f"--project={settings['PROJECT']}"

    def cost(self) -> str:
        """The chips' costs run while pods do; the cluster itself has a small fee."""
        return cost_of_chips(self.settings)

    def create(self) -> None:
        """The cluster, its credentials for kubectl, and the JobSet controller."""
        clusters = ("gcloud", "container", "clusters")
        self.shell.run(*clusters, "create-auto", *self._cluster)
        self.shell.run(*clusters, "get-credentials", *self._cluster)
        self.shell.run("kubectl", "apply", "--server-side", "-f", JOBSET)

    def machines(self) -> Machines:
        """The state of the cluster."""
        try:
            answer = self.shell.read("gcloud", "container", "clusters", "describe", *self._cluster, "--format=json")
            state = json.loads(answer)["status"]
        except CommandFailed as error:
            gone = "NOT_FOUND" in error.said or "Not found" in error.said
            return Machines.ABSENT if gone else Machines.UNKNOWN
        except (ValueError, LookupError, TypeError):
            return Machines.UNKNOWN
        if state in ("PROVISIONING", "RECONCILING", "STOPPING"):
            return Machines.WAITING
        # A cluster in ERROR or DEGRADED may hold other people's work: never deleted from here.
        return Machines.READY if state == "RUNNING" else Machines.UNKNOWN

    def setup(self) -> None:
        """Builds and pushes the image."""
        image = self.settings["IMAGE"]
        self.shell.run("docker", "build", "--file", str(ROOT / "launch/gke/Dockerfile"), "--tag", image, str(ROOT))
        self.shell.run("docker", "push", image, tries=3)

    def manifest(self) -> str:
        """The JobSet as YAML; every value is written as JSON, which YAML reads."""
        settings = self.settings
        hosts = max(1, (chips(settings) or 1) // int(settings["CHIPS_PER_HOST"]))
        words = train_words(settings, shlex.quote(f"/bucket/runs/{settings['RUN_ID']}"), "/bucket/runs/.compile_cache")
        values = {
            **{key: json.dumps(settings[key]) for key in ("NAME", "ACCELERATOR", "TOPOLOGY", "IMAGE", "BUCKET")},
            **{key: str(int(settings[key])) for key in ("RESTARTS", "CHIPS_PER_HOST")},
            "HOSTS": str(hosts),
            "SPOT": '\n                cloud.google.com/gke-spot: "true"' if settings["SPOT"] == "yes" else "",
            "COMMAND": json.dumps(["python", *shlex.split(" ".join(words)), "--distributed"]),
        }
        text = (ROOT / "launch/gke/jobset.yaml").read_text(encoding="utf-8")
        for key, value in values.items():
            text = text.replace("{" + key + "}", value)
        return text

    def run(self) -> None:
        """Applies the JobSet; what is left of one that has ended is removed first."""
        self.shell.run("kubectl", "delete", "jobset", self.settings["NAME"], "--ignore-not-found")
        self.shell.run("kubectl", "apply", "-f", "-", stdin=self.manifest())

    def job(self) -> Job:
        """From the conditions of the JobSet."""
        try:
            answer = self.shell.read("kubectl", "get", "jobset", self.settings["NAME"], "--output=json")
            found = json.loads(answer).get("status", {})
            true = {
                one["type"]: one.get("message", "") for one in found.get("conditions", []) if one["status"] == "True"
            }
            jobs = (found.get("replicatedJobsStatus") or [{}])[0]
        except CommandFailed as error:
            absent = "NotFound" in error.said or "not found" in error.said
            return Job(State.IDLE, "there is no JobSet") if absent else Job(State.UNKNOWN, str(error))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            return Job(State.UNKNOWN, f"kubectl's answer was not understood ({error})")
        detail = f"restarts {found.get('restarts', 0)}"
        if "Completed" in true:
            return Job(State.DONE, detail)
        if "Failed" in true:
            return Job(State.FAILED, f"{detail}; {true['Failed']}")
        return Job(State.RUNNING if jobs.get("ready") else State.WAITING, detail)

    def stop(self) -> None:
        """Removes the JobSet: its pods get SIGTERM and three minutes to save."""
        self.shell.run("kubectl", "delete", "jobset", self.settings["NAME"], "--ignore-not-found")

    def logs(self, lines: int) -> str:
        """The end of every pod's log."""
        label = f"--selector=jobset.sigs.k8s.io/jobset-name={self.settings['NAME']}"
        return self.shell.read("kubectl", "logs", label, "--container=main", "--prefix", f"--tail={lines}")

    def ssh(self) -> int:
        """A shell in the first pod."""
        job = f"job/{self.settings['NAME']}-slice-0"
        return self.shell.attach("kubectl", "exec", "--stdin", "--tty", job, "--container=main", "--", "bash")

    def delete(self) -> None:
        """The cluster, with everything in it."""
        try:
            self.shell.run("gcloud", "container", "clusters", "delete", *self._cluster, "--quiet")
        except CommandFailed as error:
            if "NOT_FOUND" not in error.said and "Not found" not in error.said:
                raise
