"""An evaluation gives the NumPy answer over the whole set, whatever the batch size and the number of devices."""

import contextlib
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError
from jax_densevit.models.output import DenseOutput
from jax_densevit.tasks.segmentation import SegmentationTask
from jax_densevit.training.evaluation import evaluate, save_evaluation
from jax_densevit.training.mesh import make_mesh

INFO = DataInfo("toy", classes=("dark", "middle", "light", "absent"), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class Scenes:
    """Pictures of several sizes whose red channel says the class, mostly; a pure function of the index."""

    info = INFO

    def __init__(self, n, sizes=((6, 8), (5, 5), (7, 4)), wrong_label=None):
        self.n, self.sizes, self.wrong_label = n, sizes, wrong_label

    def __len__(self):
        return self.n

    def size(self, index):
        return self.sizes[index * 7 % len(self.sizes)]

    def read(self, index):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (*self.size(index), 3)).astype(np.uint8)
        labels = (image[..., 0] // 86).astype(np.uint8)
        noise = rng.random(labels.shape)
        labels[noise < 0.2] = rng.integers(0, 3)
        labels[noise > 0.9] = 255
        if self.wrong_label is not None:
            labels[0, 0] = self.wrong_label
        return {"image": image, "labels": labels, "id": f"scene {index}"}


@jax.jit
def forward(images):
    """Logits that choose the class by the red channel, pixel by pixel."""
    centers = jnp.array([43, 128, 213, 999]) / 255.0
    return DenseOutput(-jnp.abs(images[..., :1] - centers), covers=images.shape[1:3])


def slow_scores(source, n):
    matrix = np.zeros((4, 4), np.int64)
    for index in range(n):
        example = source.read(index)
        predicted = np.abs(example["image"][..., :1] / 255.0 - np.array([43, 128, 213, 999]) / 255).argmin(-1)
        for label, prediction in zip(example["labels"].ravel(), predicted.ravel(), strict=True):
            if label != 255:
                matrix[label, prediction] += 1
    return matrix


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 1), (1, 4), (1, 13), (8, 8), (8, 16)])
def test_thirteen_examples_exactly(devices, batch_size):
    source, task = Scenes(13), SegmentationTask(INFO)
    mesh = make_mesh(devices=jax.devices()[:devices])
    seen = []
    with jax.transfer_guard("disallow"):  # as the trainer's loop has it
        found = evaluate(
            task, forward, source, mesh=mesh, batch_size=batch_size, sheet=3, progress=lambda *done: seen.append(done)
        )
    matrix = slow_scores(source, 13)
    assert np.array(found.results["segmentation"]["confusion"])[:, :4].tolist() == matrix.tolist()
    iou = [matrix[c, c] / (matrix[c].sum() + matrix[:, c].sum() - matrix[c, c]) for c in range(3)]
    assert found.summary["mIoU"] == np.mean(iou) and next(iter(found.summary)) == "mIoU"
    assert found.count == 13 and seen[-1] == (13, 13)
    # The sheet shows the same examples whatever the batches are.
    assert [example["name"] for example in found.examples] == ["scene 0", "scene 6", "scene 12"]
    for example in found.examples:
        red = example["image"][..., :1] / 255.0
        expected = np.abs(red - np.array([43, 128, 213, 999]) / 255).argmin(-1)
        np.testing.assert_array_equal(example["predicted_labels"], expected)


@pytest.mark.parametrize("options", [{}, {"mode": "slide", "crop": 8, "stride": 5}])
def test_many_sizes_get_room_and_the_same_numbers(options, monkeypatch):
    """More sizes than are worth compiling for: arrays are larger than pictures, and nothing else changes."""
    source, task = Scenes(13), SegmentationTask(INFO, **options)
    mesh = make_mesh(devices=jax.devices()[:1])
    exact = evaluate(task, forward, source, mesh=mesh, batch_size=4, sheet=3)
    monkeypatch.setattr("jax_densevit.training.evaluation.EXACT_SIZES", 2)
    roomy = evaluate(task, forward, source, mesh=mesh, batch_size=4, sheet=3)
    assert roomy.results == exact.results
    assert np.array(roomy.results["segmentation"]["confusion"])[:, :4].tolist() == slow_scores(source, 13).tolist()
    for a, b in zip(roomy.examples, exact.examples, strict=True):
        np.testing.assert_array_equal(a["predicted_labels"], b["predicted_labels"])


def test_limit_and_files(tmp_path):
    source, task = Scenes(13), SegmentationTask(INFO)
    mesh = make_mesh(devices=jax.devices()[:1])
    found = evaluate(task, forward, source, mesh=mesh, batch_size=4, limit=5, sheet=50)
    assert found.count == 5 and len(found.examples) == 5
    assert found.results["segmentation"]["pixels"] == slow_scores(source, 5).sum()
    paths = save_evaluation(found, task, tmp_path, "val", 30, {"data": "toy"})
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == [
        "val-30.json",
        "val-30_confusion.png",
        "val-30_sheet.png",
    ]
    assert len(paths) == 3
    values = json.loads((tmp_path / "eval/val-30.json").read_text())
    assert values["examples"] == 5 and values["step"] == 30 and values["data"] == "toy"
    assert values["summary"]["mIoU"] == found.summary["mIoU"]
    assert values["segmentation"]["per_class"][3] == {
        "class": "absent",
        "IoU": None,
        "accuracy": None,
        "precision": None,
        "dice": None,
        "pixels": 0,
        "predicted_pixels": 0,
    }
    assert values["protocol"]["mode"] == "whole"
    for path in paths[1:]:
        with Image.open(path) as picture:
            assert picture.width > 200


def test_sliding_over_eight_devices():
    """Windows of a batch that is divided over devices, against one device and one picture at a time."""
    source = Scenes(5, sizes=((12, 20), (16, 9), (5, 7)))
    task = SegmentationTask(INFO, mode="slide", crop=8, stride=5, flip=True)
    one = evaluate(task, forward, source, mesh=make_mesh(devices=jax.devices()[:1]), batch_size=1, sheet=0)
    eight = evaluate(task, forward, source, mesh=make_mesh(), batch_size=8, sheet=0)
    assert one.results == eight.results
    assert np.array(one.results["segmentation"]["confusion"])[:, :4].tolist() == slow_scores(source, 5).tolist()


def test_labels_that_are_no_class_stop_the_evaluation():
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match="neither a class"):
        evaluate(SegmentationTask(INFO), forward, Scenes(3, wrong_label=200), mesh=mesh, batch_size=2)


def test_an_interrupted_write_leaves_nothing(tmp_path):
    task = SegmentationTask(INFO)
    mesh = make_mesh(devices=jax.devices()[:1])
    found = evaluate(task, forward, Scenes(2), mesh=mesh, batch_size=2, sheet=1)
    with pytest.raises(TypeError):
        save_evaluation(found, task, tmp_path, "val", 1, {"not json": object()})
    assert not (tmp_path / "eval/val-1.json").exists()
    assert not list(tmp_path.rglob("*.part*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_evaluation(found, task, tmp_path / "file", "val", 1, {})


def summary_of(mesh):
    """Everything that an evaluation of 13 scenes by windows gives, as JSON."""
    task = SegmentationTask(INFO, mode="slide", crop=8, stride=5, flip=True)
    found = evaluate(task, forward, Scenes(13), mesh=mesh, batch_size=4, sheet=3)
    shown = [[example["name"], example["predicted_labels"].tolist()] for example in found.examples]
    return json.dumps([found.results, found.count, shown])


@pytest.mark.multiprocess
def test_two_processes_give_what_one_gives():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    with contextlib.ExitStack() as stack:
        workers = []
        for i in range(2):
            command = [sys.executable, __file__, port, str(i)]
            workers.append(
                stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
            )
            stack.callback(workers[-1].kill)
        outputs = [worker.communicate(timeout=120)[0].strip().splitlines()[-1] for worker in workers]
    assert outputs[0] == outputs[1] == summary_of(make_mesh(devices=jax.devices()[:1]))


if __name__ == "__main__":  # one of the processes of the test above
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
    # As on a TPU, whose mesh follows its wires: the devices of both processes by turns.
    print(summary_of(make_mesh(devices=jax.devices()[::2] + jax.devices()[1::2])))
