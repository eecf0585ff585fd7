"""What the babysitter does in every state of machines and training; time is made of the test's own numbers."""

import json

import pytest
from fake_cloud import FakeCloud, request, write_settings

from launch.babysit import Babysitter, Bounds
from launch.backend import Backend, Job, Machines, State
from launch.gce import Gce
from launch.gke import Gke
from launch.hosts import judge
from launch.settings import read_settings
from launch.shell import CommandFailed, Shell
from launch.slurm import Slurm
from launch.tpu_vm import NODE, REQUEST, TpuVm


class Played(Backend):
    """A backend that plays looks, [(machines, job), ...], and writes down what was done. The last look stays."""

    def __init__(self, looks, fail=()):
        self.looks, self.done, self.fail = list(looks), [], list(fail)

    def machines(self):
        self.look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        return self.look[0]

    def job(self):
        return self.look[1]

    def _do(self, name):
        self.done.append(name)
        if self.fail and self.fail[0] == name:
            self.fail.pop(0)
            raise CommandFailed((name,), 1, "Quota exceeded")

    def create(self):
        self._do("create")

    def setup(self):
        self._do("setup")

    def run(self):
        self._do("run")

    def stop(self):
        self._do("stop")

    def kill(self):
        self._do("kill")

    def delete(self):
        self._do("delete")

    def logs(self, lines):
        return ""

    def ssh(self):
        return 0


def on(state: State, step=None):
    return (Machines.READY, Job(state, "", step))


def off(machines: Machines):
    return (machines, None)


def sit(backend, **bounds):
    """(exit code, seconds slept one after another, lines said)."""
    slept, said = [], []
    bounds = {"poll": 1.0, "restarts": 3, "retries": 1, "grace": 5.0} | bounds
    code = Babysitter(backend, Bounds(**bounds), slept.append, lambda: sum(slept), said.append).watch()
    return code, slept, "\n".join(said)


def test_from_nothing_to_done():
    backend = Played(
        [off(Machines.ABSENT), off(Machines.WAITING), off(Machines.WAITING), on(State.BARE), on(State.RUNNING)]
        + [on(State.RUNNING, 10), on(State.ENDING, 20), on(State.DONE, 20)]
    )
    assert sit(backend)[0] == 0
    assert backend.done == ["create", "setup", "run"]


def test_preempted_machines_are_deleted_and_asked_for_again():
    backend = Played(
        [on(State.RUNNING, 5), off(Machines.LOST), off(Machines.WAITING), on(State.BARE, 5), on(State.DONE, 9)]
    )
    assert sit(backend)[0] == 0
    assert backend.done == ["delete", "create", "setup", "run"]


@pytest.mark.parametrize("look", [off(Machines.UNKNOWN), on(State.UNKNOWN)])
def test_nothing_is_touched_in_an_unknown_state(look):
    backend = Played([look])
    code, slept, said = sit(backend)
    assert code == 1 and backend.done == [] and len(slept) == 59
    assert "Nothing was deleted" in said
    # One answer that is understood starts the count again.
    backend = Played([look] * 59 + [on(State.RUNNING)] + [look] * 59 + [on(State.DONE)])
    assert sit(backend)[0] == 0 and backend.done == []


def test_75_is_run_again_with_longer_and_longer_waits():
    code, slept, said = sit(Played([on(State.STOPPED, 5)]))
    assert code == 1 and "given up" in said
    assert [seconds for seconds in slept if seconds != 1.0] == [2.0, 4.0]  # 0, 1, 2, 4 before the four restarts


def test_a_newer_checkpoint_forgives_restarts():
    backend = Played(
        [look for step in range(30) for look in (on(State.RUNNING, step), on(State.STOPPED, step))]
        + [on(State.DONE, 30)]
    )
    assert sit(backend)[0] == 0 and backend.done == ["run"] * 30


def test_an_error_of_the_program_is_tried_once_more():
    backend = Played([on(State.FAILED)])
    assert sit(backend)[0] == 1 and backend.done == ["run"]
    backend = Played([on(State.FAILED)])
    assert sit(backend, retries=0)[0] == 1 and backend.done == []


def test_a_dead_process_takes_the_others_along_at_once():
    backend = Played([on(State.RUNNING, 5), on(State.BROKEN, 5), on(State.RUNNING, 5), on(State.DONE, 9)])
    assert sit(backend)[0] == 0 and backend.done == ["kill", "run"]


def test_processes_may_end_one_after_another_but_not_for_ever():
    backend = Played([on(State.ENDING, 5)] * 7 + [on(State.DONE, 9)])
    assert sit(backend)[0] == 0 and backend.done == ["kill", "run"]
    backend = Played([on(State.ENDING, 5)] * 4 + [on(State.DONE, 9)])
    assert sit(backend)[0] == 0 and backend.done == []


def test_stopped_by_hand_stays_stopped():
    backend = Played([on(State.RUNNING, 5), on(State.HALTED, 6)])
    assert sit(backend)[0] == 75 and backend.done == []


def test_quota_errors_are_bounded():
    backend = Played([off(Machines.ABSENT)], fail=["create"] * 9)
    code, slept, said = sit(backend)
    assert code == 1 and backend.done == ["create"] * 4 and "Quota exceeded" in said


def test_a_scheduler_restarts_by_itself():
    backend = Played([on(State.IDLE), on(State.WAITING), on(State.RUNNING, 5), on(State.FAILED, 5)])
    backend.self_restarting = True
    assert sit(backend)[0] == 1 and backend.done == ["run"]
    backend = Played([on(State.IDLE), on(State.RUNNING), on(State.IDLE)])  # `stop` removed it
    backend.self_restarting = True
    assert sit(backend)[0] == 75 and backend.done == ["run"]


@pytest.mark.parametrize(
    ("hosts", "state"),
    [
        ("bare bare", State.BARE),
        ("none none", State.IDLE),
        ("running running", State.RUNNING),
        ("exited:0 running", State.ENDING),
        ("exited:75 running", State.ENDING),
        ("exited:137 running", State.BROKEN),
        ("exited:1 running", State.BROKEN),
        ("died running", State.BROKEN),
        ("none running", State.BROKEN),
        ("bare running", State.BARE),
        ("exited:0 exited:0", State.DONE),
        ("exited:75 exited:75", State.STOPPED),
        ("exited:0 exited:75", State.STOPPED),
        ("halted:75 halted:75", State.HALTED),
        ("exited:137 exited:134", State.KILLED),
        ("exited:137 exited:1", State.KILLED),
        ("died exited:75", State.KILLED),
        ("none exited:75", State.KILLED),
        ("exited:1 exited:1", State.FAILED),
        ("exited:2 exited:0", State.FAILED),
        ("odd running", State.UNKNOWN),
        ("", State.UNKNOWN),
    ],
)
def test_exit_codes(hosts, state):
    given = [
        (f"h{i}", word.partition(":")[0], int(word.partition(":")[2] or 0)) for i, word in enumerate(hosts.split())
    ]
    assert judge(given, 7).state is state


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    return FakeCloud(tmp_path / "cloud", monkeypatch)


def backend(kind, tmp_path):
    name = {TpuVm: "tpu_vm", Gce: "gce", Gke: "gke", Slurm: "slurm"}[kind]
    return kind(read_settings(write_settings(tmp_path, name)), Shell(sleep=lambda seconds: None))


REQUESTS = [(state, meaning) for state, meaning in REQUEST.items() if state != "ACTIVE"] + [
    ("NEW_STATE", Machines.UNKNOWN)
]
NODES = [*NODE.items(), ("STOPPED", Machines.UNKNOWN), ("HIDDEN", Machines.UNKNOWN)]


@pytest.mark.parametrize(("state", "meaning"), REQUESTS)
def test_states_of_requests(cloud, tmp_path, state, meaning):
    cloud.play("queued-resources describe", request(state))
    assert backend(TpuVm, tmp_path).machines() is meaning


@pytest.mark.parametrize(("state", "meaning"), NODES)
def test_states_of_nodes(cloud, tmp_path, state, meaning):
    cloud.play("queued-resources describe", request("ACTIVE"))
    cloud.play("tpu-vm describe", json.dumps({"state": state}))
    assert backend(TpuVm, tmp_path).machines() is meaning


@pytest.mark.parametrize("kind", [TpuVm, Gce, Gke])
@pytest.mark.parametrize(
    ("answer", "code", "meaning"),
    [
        ("ERROR: NOT_FOUND: Resource was not found", 1, Machines.ABSENT),
        ("ERROR: Reauthentication failed", 1, Machines.UNKNOWN),
        ("<html>502</html>", 0, Machines.UNKNOWN),
        ("", 0, Machines.UNKNOWN),
        ("[7]", 0, Machines.UNKNOWN),
    ],
)
def test_answers_that_are_none(cloud, tmp_path, kind, answer, code, meaning):
    cloud.play("(describe|list-instances)", answer, code=code)
    assert backend(kind, tmp_path).machines() is meaning


@pytest.mark.parametrize(
    ("states", "meaning"),
    [
        (["RUNNING"] * 4, Machines.READY),
        (["RUNNING"] * 3, Machines.WAITING),
        ([], Machines.WAITING),
        (["RUNNING", None, "STAGING", "RUNNING"], Machines.WAITING),
        (["RUNNING", "TERMINATED", "RUNNING", "RUNNING"], Machines.LOST),
        (["RUNNING", "TERMINATED", "SOMETHING", "RUNNING"], Machines.UNKNOWN),
    ],
)
def test_states_of_instance_groups(cloud, tmp_path, states, meaning):
    instances = [
        {"instance": f"z/i{n}"} | ({"instanceStatus": state} if state else {}) for n, state in enumerate(states)
    ]
    cloud.play("list-instances", json.dumps(instances))
    assert backend(Gce, tmp_path).machines() is meaning


def test_instances_that_are_gone(cloud, tmp_path):
    """A preempted instance may leave an entry without a machine, or none at all; a new group has such entries too."""
    gce = backend(Gce, tmp_path)
    running = [{"instance": f"z/i{n}", "instanceStatus": "RUNNING", "currentAction": "NONE"} for n in range(4)]
    looks = [
        ([], Machines.WAITING),
        ([{"instance": "z/i0", "currentAction": "CREATING"}], Machines.WAITING),
        ([*running[:3], {"instance": "z/i3", "currentAction": "NONE"}], Machines.LOST),
        ([*running[:3], {"instance": "z/i3", "currentAction": "ODD"}], Machines.UNKNOWN),
        (running, Machines.READY),
        (running[:3], Machines.LOST),
        ([], Machines.LOST),
    ]
    cloud.play("list-instances", *(json.dumps(answer) for answer, _ in looks))
    assert [gce.machines() for _ in looks] == [meaning for _, meaning in looks]


@pytest.mark.parametrize(
    ("queue", "account", "state"),
    [
        ("PENDING", "", State.WAITING),
        ("RUNNING", "", State.RUNNING),
        ("", "COMPLETED|0:0", State.DONE),
        ("", "FAILED|75:0", State.STOPPED),
        ("", "FAILED|1:0", State.FAILED),
        ("", "NODE_FAIL|0:0", State.KILLED),
        ("", "CANCELLED by 1000|0:15", State.HALTED),
        ("", "REVOKED|0:0", State.UNKNOWN),
        ("", "", State.UNKNOWN),
        ("WEIRD", "", State.UNKNOWN),
    ],
)
def test_states_of_slurm(cloud, tmp_path, queue, account, state):
    cloud.play("^squeue", queue)
    cloud.play("^sacct", account)
    slurm = backend(Slurm, tmp_path)
    slurm.run()
    assert slurm.job().state is state


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({"replicatedJobsStatus": [{"ready": 1}]}, State.RUNNING),
        ({"replicatedJobsStatus": [{"ready": 0}]}, State.WAITING),
        ({}, State.WAITING),
        ({"conditions": [{"type": "Completed", "status": "True"}]}, State.DONE),
        ({"conditions": [{"type": "Failed", "status": "True", "message": "PodFailurePolicy"}]}, State.FAILED),
        ({"conditions": ["odd"]}, State.UNKNOWN),
    ],
)
def test_states_of_jobsets(cloud, tmp_path, status, state):
    cloud.play("get jobset", json.dumps({"status": status}))
    assert backend(Gke, tmp_path).job().state is state


def test_a_whole_preemption_against_gcloud(cloud, tmp_path):
    """From an empty project: asked for, stopped, preempted, no quota, ssh that fails, and done."""
    absent = "ERROR: NOT_FOUND: Resource was not found"
    cloud.once("queued-resources describe", absent, code=1)
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", *["ACTIVE"] * 3, "SUSPENDED"):
        cloud.once("queued-resources describe", request(state))
    cloud.once("queued-resources describe", absent, code=1)
    cloud.play("queued-resources describe", request("ACTIVE"))
    cloud.once("queued-resources create")
    cloud.once("queued-resources create", "ERROR: RESOURCE_EXHAUSTED: Quota exceeded", code=1)
    cloud.play("tpu-vm describe", json.dumps({"state": "READY"}))
    for answer in ("bare", "running", "exited 75", "bare", "running"):
        cloud.once("tpu-vm ssh.*job.sh.*status", f"densevit-host a {answer}\ndensevit-host b {answer}")
    cloud.once("tpu-vm ssh.*job.sh.*status", "ssh: Connection timed out", code=255)
    cloud.play("tpu-vm ssh.*job.sh.*status", "densevit-host a exited 0\ndensevit-host b exited 0\ndensevit-step 40 9")
    code, _, said = sit(backend(TpuVm, tmp_path), restarts=9)
    assert code == 0, said
    kinds = ("queued-resources create", "queued-resources delete", "setup.sh", "job.sh\\ start", "job.sh start")
    done = [
        next(kind for kind in kinds if kind in call) for call in cloud.calls() if any(kind in call for kind in kinds)
    ]
    done = [kind.replace("\\", "") for kind in done]
    assert done == [
        *("queued-resources create", "setup.sh", "job.sh start", "job.sh start"),
        *("queued-resources delete", "queued-resources create", "queued-resources create", "setup.sh", "job.sh start"),
    ]
    assert "Quota exceeded" in said and "Connection timed out" in said
