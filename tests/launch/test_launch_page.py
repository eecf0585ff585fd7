"""Every command of docs/launch.md in the order of the page, against fakes: from an empty project to a resumed run."""

import json
import re
import shlex
import subprocess
from pathlib import Path

from fake_cloud import FakeCloud, request

from launch.__main__ import main
from launch.babysit import Bounds
from launch.local import Local

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LAUNCH = "python -m launch "


def host(*states: str, step: int = 0) -> list[str]:
    """What the two hosts of a slice say, one answer a state."""
    more = f"\ndensevit-step {step} 9" if step else ""
    return [f"densevit-host a {state}\ndensevit-host b {state}{more}" for state in states]


def execute(block: str) -> None:
    """Runs a block as a shell would; the launcher in this process, which is faster."""
    script = []
    for line in [*block.splitlines(), None]:
        if line is not None and not line.startswith(LAUNCH):
            script.append(line)
            continue
        if script:
            subprocess.run(["bash", "-euo", "pipefail", "-c", "\n".join(script)], check=True)
            script = []
        if line is not None:
            code = main(shlex.split(line)[3:])
            assert code == 0 or (code == 75 and "babysit" in line), f"{line} gave {code}"


def test_the_whole_page(tmp_path, monkeypatch, capsys):
    cloud = FakeCloud(tmp_path / "cloud", monkeypatch)
    folder = tmp_path / "clone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Bounds, "poll", 0.0)
    monkeypatch.setattr(Local, "python", "true")  # tests/soak_launch.py trains for real
    for program in ("true", "env", "bash", "git"):
        assert not (cloud.folder / "bin" / program).exists()

    absent = "ERROR: NOT_FOUND: Resource was not found"
    cloud.play("projects describe", "1234")
    # Queue, machines, a preemption, machines again, stopped by hand; then the same from nothing, to the end.
    for state in ["WAITING_FOR_RESOURCES"] * 2 + ["PROVISIONING"] * 2 + ["ACTIVE"] * 2 + ["SUSPENDED", "CREATING"]:
        cloud.once("queued-resources describe", request(state))
    for state in ["ACTIVE"] * 4:
        cloud.once("queued-resources describe", request(state))
    for answer in [absent] * 2:
        cloud.once("queued-resources describe", answer, code=1)
    cloud.play("queued-resources describe", request("ACTIVE"))
    cloud.play("tpu-vm describe", json.dumps({"state": "READY"}))
    for answer in [*host("bare"), *host("running", step=40), *host("bare"), *host("running", "halted 75", step=60)]:
        cloud.once("tpu-vm ssh.*status", answer)
    cloud.once("tpu-vm ssh.*status", host("halted 75", step=60)[0])
    cloud.play("tpu-vm ssh.*status", *host("bare"), *host("running", "exited 0", step=80))
    cloud.once("list-instances densevit-group", absent, code=1)
    cloud.once("list-instances densevit-group", absent, code=1)
    instances = [{"instance": f"z/densevit-group-{n}", "instanceStatus": "RUNNING"} for n in range(4)]
    cloud.play("list-instances densevit-group", json.dumps(instances))
    cloud.play("compute ssh densevit-group-.*status", "densevit-host c exited 0")
    cloud.play("clusters describe", json.dumps({"status": "RUNNING"}))
    done = {"conditions": [{"type": "Completed", "status": "True"}]}
    cloud.play("get jobset", *(json.dumps({"status": status}) for status in ({}, done)))
    cloud.play("^squeue", "PENDING", "RUNNING", "")
    cloud.play("^sacct", "COMPLETED|0:0")

    blocks = BLOCK.findall((ROOT / "docs/launch.md").read_text(encoding="utf-8"))
    assert len(blocks) == 9
    for block in blocks:
        execute(block)

    printed = capsys.readouterr().out
    assert (
        "done, checkpoint 80" in printed and "halted, checkpoint 60" in printed and "the machines are lost" in printed
    )
    creates = [call for call in cloud.calls("queued-resources create")]
    assert len(creates) == 3  # by hand, after the preemption, after the deletion
    starts = [call for call in cloud.calls("tpu-vm") if "job.sh start" in call.replace("\\", "")]
    assert len(starts) == 3 and all("runs/first" in call for call in starts)
    assert len(cloud.calls("queued-resources delete")) == 3
    # Whatever was asked for is given back.
    assert len(cloud.calls("instance-groups managed delete")) == len(cloud.calls("clusters delete")) == 1
