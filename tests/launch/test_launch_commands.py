"""Every command on every backend, against programs that record how they were called."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_cloud import FakeCloud, request, write_settings

from jax_densevit.errors import UserError
from launch.__main__ import COMMANDS, main
from launch.gke import Gke
from launch.settings import read_settings
from launch.shell import CommandFailed, Shell

ROOT = Path(__file__).parents[2]
READY = json.dumps({"state": "READY"})
INSTANCES = json.dumps([{"instance": f"z/dense-{n}", "instanceStatus": "RUNNING"} for n in range(4)])


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    (tmp_path / "launch folder").mkdir()
    return FakeCloud(tmp_path / "cloud", monkeypatch)


def launch(file: Path, *words: str) -> int:
    return main([*words, "--env", str(file)])


def words(line: str) -> list[str]:
    return shlex.split(line)


@pytest.mark.parametrize("backend", ["tpu_vm", "gce", "gke", "slurm", "local"])
@pytest.mark.parametrize("command", COMMANDS)
def test_dry_run_runs_nothing(cloud, tmp_path, capsys, backend, command):
    file = write_settings(tmp_path, backend)
    before = file.read_text()
    if (backend, command) == ("local", "ssh"):
        with pytest.raises(UserError, match="this machine has a shell"):
            launch(file, command, "--dry-run")
    else:
        assert launch(file, command, "--dry-run") == 0
    assert cloud.calls() == []
    assert file.read_text() == before and not (tmp_path / "all runs").exists()
    printed = capsys.readouterr().out
    if backend in ("tpu_vm", "gce", "gke") and command != "status":
        assert "+ " in printed


def test_tpu_vm_is_asked_for_with_its_costs(cloud, tmp_path, capsys):
    file = write_settings(tmp_path, "tpu_vm")
    with pytest.raises(UserError, match="nobody to ask; add --yes"):
        launch(file, "create")
    assert cloud.calls() == []
    assert launch(file, "create", "--yes") == 0
    assert "16 chips, 2.70 each an hour: 43.20 an hour, 1,036.80 a day" in capsys.readouterr().out
    (call,) = cloud.calls()
    assert words(call)[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "dense"]
    flags = {"--node-id=dense", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot"}
    assert flags | {"--project=my-project", "--zone=us-east5-b"} <= set(words(call))


@pytest.mark.parametrize(("answer", "created"), [("y", True), ("n", False), ("", False)])
def test_a_person_at_the_terminal_is_asked(cloud, tmp_path, monkeypatch, answer, created):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    file = write_settings(tmp_path, "tpu_vm")
    if created:
        launch(file, "create")
    else:
        with pytest.raises(UserError, match="Nothing was done"):
            launch(file, "create")
    assert bool(cloud.calls()) == created


@pytest.mark.parametrize(("kind", "chips"), [("v3-32", 16), ("v5p-8", 4), ("v5litepod-16", 16), ("odd", "an unknown")])
def test_chips_and_a_missing_price(cloud, tmp_path, capsys, kind, chips):
    launch(write_settings(tmp_path, "tpu_vm", TYPE=kind, PRICE_PER_CHIP_HOUR=""), "create", "--dry-run")
    printed = capsys.readouterr().out
    assert f"{chips}" in printed and "cloud.google.com/tpu/pricing" in printed


def test_instance_group_of_all_hosts_of_a_slice(cloud, tmp_path):
    cloud.play("instance-templates create", "ERROR: the resource 'dense' already exists", code=1)
    launch(write_settings(tmp_path, "gce"), "create", "--yes")
    policy, template, group = (words(call) for call in cloud.calls())
    assert policy[2:6] == ["resource-policies", "create", "workload-policy", "dense"]
    assert "--accelerator-topology=4x4" in policy and "--region=us-east5" in policy
    assert "--machine-type=ct6e-standard-4t" in template and "--provisioning-model=SPOT" in template
    assert {"--size=4", "--target-size-policy-mode=bulk", "--template=dense"} <= set(group)
    assert "--workload-policy=projects/my-project/regions/us-east5/resourcePolicies/dense" in group


def test_quota_error_is_one_sentence(cloud, tmp_path):
    cloud.play("create", "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPerProject' exceeded", code=1)
    with pytest.raises(CommandFailed, match="ended with 1: ERROR.*Quota limit") as failed:
        launch(write_settings(tmp_path, "tpu_vm"), "create", "--yes")
    assert "\n" not in str(failed.value)


def test_delete_twice_is_harmless(cloud, tmp_path):
    cloud.play("delete", "ERROR: NOT_FOUND: Resource was not found", code=1)
    for backend in ("tpu_vm", "gce", "gke"):
        assert launch(write_settings(tmp_path, backend), "delete", "--yes") == 0


def test_delete_that_fails_says_so(cloud, tmp_path):
    cloud.play("delete", "ERROR: PERMISSION_DENIED", code=1)
    for backend in ("tpu_vm", "gce", "gke"):
        with pytest.raises(CommandFailed, match="PERMISSION_DENIED"):
            launch(write_settings(tmp_path, backend), "delete", "--yes")


def wait_for(folder: Path, word: str) -> None:
    deadline = time.time() + 30
    while not (folder / word).exists():
        assert time.time() < deadline, f"no {word} in {folder}"
        time.sleep(0.02)


@pytest.mark.parametrize("backend", ["tpu_vm", "gce"])
def test_a_host_from_bare_to_done(cloud, tmp_path, capsys, monkeypatch, backend):
    """The scripts that ssh sends really run: names with spaces arrive, the job outlives its ssh, its end is seen."""
    seen = tmp_path / "seen"
    home = cloud.hosts(f"""#!/bin/bash
[[ $1 != -c ]] || exit 0
printf "%s\\n" "$@" >"{seen}"
echo "training output"
exit 75
""")
    cloud.play("queued-resources describe", request("ACTIVE"))
    cloud.play("tpu-vm describe", READY)
    cloud.play("list-instances", json.dumps([{"instance": "z/dense-0", "instanceStatus": "RUNNING"}]))
    shape = {"TOPOLOGY": "2x2"} if backend == "gce" else {}
    file = write_settings(tmp_path, backend, **shape)
    assert launch(file, "status") == 0
    assert "bare" in capsys.readouterr().out
    assert launch(file, "setup") == 0
    code = home / "densevit/code"
    assert (code / "launch/host/job.sh").is_file() and len((code / "COMMIT").read_text().strip()) == 12
    assert cloud.calls("gcsfuse --metadata-cache-ttl-secs=0")[0].split()[3] == "my-bucket"
    assert any("constraints.txt" in call and "code\\[tpu\\]" in call for call in cloud.calls("pip install"))
    assert launch(file, "setup") == 0  # again is harmless
    assert len(cloud.calls("gcsfuse --metadata")) == 1

    assert launch(file, "run") == 0
    job = home / "densevit/jobs/my run"
    wait_for(job, "exit_code")
    given = seen.read_text().splitlines()
    assert given[:2] == ["-m", "jax_densevit.train"]
    assert given[2:4] == ["--config=configs/my config.py:quick", "--config.steps=4"]
    assert f"--workdir={home}/bucket/runs/my run" in given and given[-1] == "--distributed"
    (home / "bucket/runs/my run/checkpoints/40").mkdir(parents=True)
    capsys.readouterr()
    assert launch(file, "status") == 0
    printed = capsys.readouterr().out
    assert "stopped: " in printed and "exited 75" in printed and "step 40, " in printed and " s old" in printed
    assert launch(file, "logs") == 0
    assert "training output" in capsys.readouterr().out
    copies = list((home / "bucket/runs/my run/hosts").glob("*.log"))
    assert len(copies) == 1 and "training output" in copies[0].read_text()
    shutil.rmtree(job)  # the machine was preempted; another one has its name
    assert launch(file, "run") == 0
    wait_for(job, "exit_code")
    again = list((home / "bucket/runs/my run/hosts").glob("*.log"))
    assert len(again) == 2 and set(copies) < set(again)


def test_flat_bucket_is_refused(cloud, tmp_path):
    cloud.hosts()
    (cloud.folder / "bin/mv").write_text('#!/bin/bash\n[[ $1 != -T ]] && exec /bin/mv "$@"\nexit 1\n')
    (cloud.folder / "bin/mv").chmod(0o755)
    with pytest.raises(CommandFailed, match="--enable-hierarchical-namespace"):
        main_without_waiting(write_settings(tmp_path, "tpu_vm"))


def main_without_waiting(file: Path) -> None:
    from launch.tpu_vm import TpuVm

    TpuVm(read_settings(file), Shell(sleep=lambda seconds: None)).setup()


def test_ssh_is_tried_again(cloud, tmp_path):
    cloud.once("tpu-vm ssh", "ssh: connect to host port 22: Connection refused", code=255)
    main_without_waiting(write_settings(tmp_path, "tpu_vm"))
    assert len(cloud.calls("tpu-vm ssh")) == 2


def test_slices_are_reached_one_by_one(cloud, tmp_path):
    file = write_settings(tmp_path, "tpu_vm", SLICES="2")
    launch(file, "create", "--yes")
    launch(file, "run")
    create, *runs = cloud.calls()
    assert "--node-count=2" in create and "--node-prefix=dense" in create and "--node-id" not in create
    assert sorted(words(run)[5] for run in runs) == ["dense-0", "dense-1"]


def test_jobset_is_yaml_with_the_contract_in_it(cloud, tmp_path):
    manifest = Gke(read_settings(write_settings(tmp_path, "gke")), Shell()).manifest()
    assert "{" not in manifest.replace('{"', "").split("rules:")[0]
    command = next(line for line in manifest.splitlines() if "command:" in line).partition("command: ")[2]
    assert json.loads(command)[:4] == ["python", "-m", "jax_densevit.train", "--config=configs/my config.py:quick"]
    assert "--workdir=/bucket/runs/my run" in json.loads(command)
    for line in (
        "parallelism: 4",
        "google.com/tpu: 4",
        'bucketName: "my-bucket"',
        'gke-spot: "true"',
        "operator: NotIn",
    ):
        assert line in manifest
    assert "values: [75, 134, 137, 139, 143]" in manifest


def test_gke_life(cloud, tmp_path, capsys):
    file = write_settings(tmp_path, "gke")
    cloud.play("clusters describe", json.dumps({"status": "RUNNING"}))
    for command in ("create", "setup", "run", "stop", "delete"):
        assert launch(file, command, "--yes") == 0
    said = [" ".join(call.split()[:4]) for call in cloud.calls()]
    assert said[:2] == ["gcloud container clusters create-auto", "gcloud container clusters get-credentials"]
    assert "kubectl apply --server-side -f" in said and "kubectl apply -f -" in said
    assert any(line.startswith("docker push pkg.dev/p/train:1") for line in said)
    assert said[-1] == "gcloud container clusters delete"
    condition = {"type": "Completed", "status": "True", "message": "all"}
    cloud.play("get jobset", json.dumps({"status": {"conditions": [condition], "restarts": 3}}))
    launch(file, "status")
    assert "done: restarts 3" in capsys.readouterr().out


def test_slurm_life(cloud, tmp_path, capsys):
    file = write_settings(tmp_path, "slurm")
    cloud.play("squeue", "RUNNING")
    launch(file, "run")
    workdir = tmp_path / "all runs/my run"
    assert (workdir / "slurm_job").read_text() == "4711\n"
    call = words(cloud.calls("sbatch")[0])
    assert {
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--partition=long",
        f"--output={workdir}/slurm.log",
    } <= set(call)
    script = next(i for i, word in enumerate(call) if word.endswith("train.sbatch"))
    assert call[script + 1] == str(workdir) and "--config=configs/my config.py:quick" in call
    (workdir / "slurm.log").write_text("step 1/4\n")
    launch(file, "status")
    assert "running: job 4711 RUNNING" in capsys.readouterr().out
    launch(file, "stop")
    assert cloud.calls("scancel") == ["scancel --signal=TERM 4711"] and (workdir / "halted").exists()
    launch(file, "delete", "--yes")
    assert cloud.calls("scancel")[-1] == "scancel 4711"


@pytest.mark.parametrize(
    ("code", "halted", "restarts", "again"),
    [(75, False, 0, True), (75, True, 0, False), (75, False, 20, False), (0, False, 0, False), (1, False, 0, False)],
)
def test_sbatch_script_asks_for_another_turn_after_75_only(cloud, tmp_path, monkeypatch, code, halted, restarts, again):
    cloud.play("^srun", "", code=code)
    if halted:
        (tmp_path / "halted").touch()
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    done = subprocess.run(["bash", ROOT / "launch/slurm/train.sbatch", tmp_path, "20", "python", "a b"])
    assert done.returncode == code
    assert cloud.calls("srun") == ["srun --kill-on-bad-exit=0 --wait=300 python a\\ b"]
    assert cloud.calls("scontrol") == (["scontrol requeue 4711"] if again else [])


def test_settings_are_checked(tmp_path, cloud):
    with pytest.raises(UserError, match="copy launch/env.example"):
        read_settings(tmp_path / "no.env")
    file = write_settings(tmp_path, "tpu_vm", RUN_ID="a/b")
    with pytest.raises(UserError, match="RUN_ID 'a/b'"):
        read_settings(file)
    for text, sentence in (
        ("BACKEND=tpuvm\n", "no launch backend named 'tpuvm'; did you mean 'tpu_vm'"),
        ("BACKEND=local\nPROCESES=3\n", "'PROCESES'; did you mean 'PROCESSES'"),
        ("BACKEND=local\nCONFIG=a b\n", "line 2: expected KEY=value"),
        ("BACKEND=local\n", "lacks CONFIG"),
        ("BACKEND=local\nCONFIG=a\nPROCESSES=four\n", "PROCESSES='four' must be a whole number"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_settings(file)


def test_example_settings_are_settings(tmp_path):
    assert read_settings(ROOT / "launch/env.example")["BACKEND"] == "tpu_vm"


def test_a_run_without_a_name_gets_one_that_stays(cloud, tmp_path):
    file = write_settings(tmp_path, "tpu_vm", RUN_ID="")
    with pytest.raises(UserError, match="names no RUN_ID"):
        launch(file, "status")
    launch(file, "create", "--yes")
    name = read_settings(file)["RUN_ID"]
    assert name
    launch(file, "run")
    assert read_settings(file)["RUN_ID"] == name


def test_scripts_are_clean():
    scripts = [*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch"), *Path(__file__).parent.glob("*.sh")]
    assert len(scripts) >= 4
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    # Beside the interpreter, so that an environment that is not activated has it too.
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=beside)
    assert shellcheck, "shellcheck comes with the test extra: pip install '.[test]'"
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
