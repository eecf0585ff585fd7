"""What `predict` writes of a COCO set, scored by pycocotools on the set's own file, is what evaluation reports."""

import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jax_densevit.data.run_lengths import run_lengths
from jax_densevit.data.source import CROWD
from jax_densevit.data.sources.registry import create_source
from jax_densevit.models.output import QueryOutput
from jax_densevit.tasks import create_task

SIZE, QUERIES = (120, 150), 16
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "kite"}]
STATS = "AP AP50 AP75 AP_small AP_medium AP_large AR_1 AR_10 AR_100 AR_small AR_medium AR_large".split()


def disc(y, x, radius):
    rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def coco_set(folder, pictures=5):
    """Discs that do not touch, small, medium and large; in every picture two crowds of one class side by side."""
    rng = np.random.default_rng(11)
    images, annotations = [], []
    for picture in range(pictures):
        image = rng.integers(0, 256, (*SIZE, 3), np.uint8)
        Image.fromarray(image).save(folder / f"{picture:03}.png")
        images.append({"id": 100 - picture, "file_name": f"{picture:03}.png", "height": SIZE[0], "width": SIZE[1]})
        masks = [disc(28, 30, rng.integers(6, 26)), disc(28, 110, 8), disc(86, 100, rng.integers(20, 30))]
        if picture == 3:
            masks = [disc(38, 66, 60), disc(20, 140, 10)]
        kinds = [(mask, int(rng.choice([3, 7, 90])), 0) for mask in masks]
        crowds = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
        crowds[0][100:116, 4:24], crowds[1][100:116, 24:60] = True, True
        kinds += [(crowd, 3, 1) for crowd in crowds]
        for mask, category, crowd in kinds:
            one = {"id": len(annotations) + 1, "image_id": images[-1]["id"], "category_id": category, "iscrowd": crowd}
            annotations.append({**one, "area": int(mask.sum()), "segmentation": run_lengths(mask)})
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            annotations[-1]["bbox"] = [int(columns[0]), int(rows[0]), len(columns), len(rows)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "instances.json").write_text(json.dumps(content))
    return content


def answer(example, rng, k):
    """Objects eroded and shifted, doubled, of a wrong class; two masks on crowds: in one, and over both."""
    masks, labels = [], []
    for number in np.unique(example["instances"]):
        mask = example["instances"] == number
        if 0 < number < CROWD:
            label = int(example["labels"][mask][0]) - 1
            for shift in (rng.integers(0, 3), rng.integers(2, 7)):
                masks.append(mask & np.roll(mask, shift, rng.integers(0, 2)))
                labels.append(label if rng.random() < 0.8 else (label + 1) % k)
    for left, right in ((8, 22), (10, 50), (14, 110)):  # the last half beside them: excused by their union alone
        mask = np.zeros(SIZE, bool)
        mask[102:114, left:right] = True
        masks.append(mask)
        labels.append(0)
    class_logits = np.zeros((1, QUERIES, k + 1), np.float32)
    mask_logits = np.full((1, QUERIES, *SIZE), -9, np.float32)
    class_logits[..., k] = 9
    for query, (mask, label) in zip(rng.permutation(QUERIES), zip(masks, labels, strict=True), strict=False):
        class_logits[0, query, k], class_logits[0, query, label] = 0, rng.uniform(0.5, 4)
        mask_logits[0, query][mask] = rng.uniform(1, 6)
    return QueryOutput(jnp.asarray(class_logits), jnp.asarray(mask_logits), covers=SIZE)


def test_the_average_precision_of_the_written_files_is_the_one_reported(tmp_path):
    content = coco_set(tmp_path)
    source = create_source("coco_instances", images=str(tmp_path), annotations=str(tmp_path / "instances.json"))
    task = create_task("instances", source.info)
    metric, measure, rng = task.metrics()["precision"], jax.jit(task.measure), np.random.default_rng(5)
    state, results = metric.empty(), []
    image_ids = {image["file_name"]: image["id"] for image in content["images"]}
    category_ids = {category["name"]: category["id"] for category in CATEGORIES}
    for index in range(len(source)):
        example = source.read(index)
        assert {CROWD, CROWD + 1} < set(np.unique(example["instances"]).tolist()), "crowds are told apart"
        batch = {name: value[None] for name, value in example.items() if name != "id"}
        output = answer(example, rng, task.num_outputs)
        predictions = jax.device_get(task.decode(lambda images, output=output: output, batch))
        counts = measure(predictions, {**batch, "mask": np.ones(1, bool)})
        state = metric.merge(state, jax.device_get(counts["precision"]))
        one = {name: value[0] for name, value in predictions.items() if name != "truth"}
        paths = task.write(example["image"], one, tmp_path, example["id"], {"image": f"{example['id']}.png"})
        report = json.loads(paths[-1].read_text())
        names = {category["id"]: category["name"] for category in report["categories"]}
        results += [
            {
                **annotation,
                "image_id": image_ids[annotation["image_id"]],
                "category_id": category_ids[names[annotation["category_id"]]],
            }
            for annotation in report["annotations"]
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "instances.json"))
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    found = metric.compute(state)
    for name, value in zip(STATS, evaluation.stats, strict=True):
        assert (-1 if found[name] is None else found[name]) == pytest.approx(value, abs=1e-9), name
    assert 0.1 < found["AP"] < 0.9 and found["AP_small"] != found["AP_medium"] and found["AP_large"] is not None
