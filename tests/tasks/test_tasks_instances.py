"""Instances: what a perfect answer scores, what odd batches cost, how pixels are shared out, what is written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError
from jax_densevit.models.output import QueryOutput
from jax_densevit.tasks import create_task
from jax_densevit.tasks.instance_pictures import outlined

CLASSES = ("background", "cat", "dog", "sky")
INFO = DataInfo("toy", CLASSES, ((0, 0, 0), (200, 0, 0), (0, 200, 0), (0, 0, 200)), things=("cat", "dog"))
SIZE, QUERIES = (16, 24), 5


def scene():
    """A cat and a dog that touch, a cat apart, sky above."""
    labels, instances = np.zeros((2, *SIZE), np.uint8), np.zeros((2, *SIZE), np.uint16)
    for number, label, rows, columns in ((1, 1, (6, 12), (2, 8)), (2, 2, (6, 12), (8, 13)), (9, 1, (5, 14), (17, 22))):
        labels[0, slice(*rows), slice(*columns)] = label
        instances[0, slice(*rows), slice(*columns)] = number
    labels[0, :3] = 3
    image = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
    return {"image": image, "labels": labels, "instances": instances}


def answer(batch, k, order=(3, 0, 4, 1), sure=12.0):
    """The outputs of a model that knows: query `order[i]` answers for object i of each picture, stuff included."""
    class_logits = np.zeros((2, QUERIES, k + 1), np.float32)
    class_logits[..., k] = sure
    mask_logits = np.full((2, QUERIES, *SIZE), -sure, np.float32)
    for b in range(2):
        wanted = [(batch["instances"][b] == n, 0 if n != 2 else 1) for n in (1, 2, 9)]
        wanted += [(batch["labels"][b] == 3, 2)] if k == 3 else []
        for query, (mask, kind) in zip(order, wanted, strict=False):
            if mask.any():
                class_logits[b, query, k], class_logits[b, query, kind] = 0, sure
                mask_logits[b, query][mask] = sure
    return QueryOutput(jnp.asarray(class_logits), jnp.asarray(mask_logits), covers=SIZE)


def scores(task, batch, output):
    batch = {**batch, "mask": np.ones(2, bool)}
    predictions = task.decode(lambda images: output, batch)
    counts = jax.device_get(jax.jit(task.measure)(predictions, batch))
    metrics = task.metrics()
    found = {name: m.compute(m.merge(m.empty(), jax.device_get(counts[name]))) for name, m in metrics.items()}
    return predictions, task.summary(found)


@pytest.mark.parametrize("panoptic", [False, True])
def test_a_perfect_answer_scores_all(panoptic):
    task = create_task("instances", INFO, panoptic=panoptic)
    batch = scene()
    predictions, numbers = scores(task, batch, answer(batch, task.num_outputs))
    for name in ("PQ", "SQ", "RQ", "AP", "AP50", "accuracy", "ARI"):
        assert numbers[name] == pytest.approx(1), name
    assert numbers["dice_loss"] == pytest.approx(0, abs=1e-6)
    segments = np.asarray(predictions["segments"])
    # DETR numbers its first object 0, which is void; here numbers begin at 1.
    assert (segments[0][batch["instances"][0] > 0] > 0).all() and not segments[1].any()
    assert len(np.unique(segments[0])) == (5 if panoptic else 4)


def test_a_wrong_class_and_a_missed_object_cost_what_they_should():
    task = create_task("instances", INFO)
    batch = scene()
    output = answer(batch, 2)
    logits = np.array(output.class_logits)
    logits[0, 3, [0, 1]] = logits[0, 3, [1, 0]]  # the first cat is called a dog
    _, numbers = scores(task, batch, output.replace(class_logits=jnp.asarray(logits)))
    assert numbers["accuracy"] == pytest.approx(2 / 3)
    # Cats: one hit, one missed: 1 / 1.5. Dogs: one hit, one false: 1 / 1.5.
    assert numbers["PQ"] == pytest.approx(2 / 3)


def test_the_loss_of_a_perfect_answer_is_small_and_falls_when_it_is_followed():
    task = create_task("instances", INFO, slots=4, bce_weight=1.0)
    batch = {name: jnp.asarray(value) for name, value in scene().items()}
    perfect = answer(scene(), 2)

    @jax.jit
    def total(output):
        terms = task.loss(output, batch)
        return sum(term.coefficient * term.sum / jnp.maximum(term.weight, 1e-9) for term in terms.values())

    assert total(perfect) < 0.05
    start = perfect.replace(class_logits=0.01 * perfect.class_logits, mask_logits=0.01 * perfect.mask_logits)
    value, gradient = jax.value_and_grad(lambda logits: total(start.replace(mask_logits=logits)))(start.mask_logits)
    assert value > 1 and total(start.replace(mask_logits=start.mask_logits - 50 * gradient)) < value


@pytest.mark.parametrize(("case", "points"), [("empty", 32), ("crowded", 0), ("queries", 0)])
def test_odd_batches_have_finite_losses(case, points):
    """A batch without any object; more objects than slots; more objects than queries."""
    batch = scene()
    task = create_task("instances", INFO, slots=2 if case == "crowded" else 8, points=points, bce_weight=1.0)
    if case == "empty":
        batch["labels"][:], batch["instances"][:] = 0, 0
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    output = answer(scene(), 2)
    if case == "queries":
        output = output.replace(class_logits=output.class_logits[:, :2], mask_logits=output.mask_logits[:, :2])
    output = output.replace(auxiliary=(output,))

    @jax.jit
    def terms_and_gradient(mask_logits):
        def total(mask_logits):
            terms = task.loss(output.replace(mask_logits=mask_logits), batch)
            return sum(term.sum for term in terms.values()), {name: (t.sum, t.weight) for name, t in terms.items()}

        return jax.value_and_grad(total, has_aux=True)(mask_logits)

    (_, values), gradient = terms_and_gradient(output.mask_logits)
    assert all(np.isfinite(pair).all() for pair in values.values()) and jnp.isfinite(gradient).all()
    assert values["dice"][1] == {"empty": 0, "crowded": 2, "queries": 2}[case]
    assert values["class"][1] > 0, "queries learn that there is nothing"
    assert values["unmatched"][0] == {"empty": 0, "crowded": 1, "queries": 1}[case]
    assert values["auxiliary_dice"][1] == values["dice"][1]


def test_losses_add_up_over_parts_of_a_batch():
    task = create_task("instances", INFO, slots=4, bce_weight=1.0, points=16)
    batch = {name: jnp.asarray(value) for name, value in scene().items()}
    batch["seed"] = jnp.arange(4, dtype=jnp.uint32).reshape(2, 2)
    output = answer(scene(), 2, sure=0.5)
    loss = jax.jit(task.loss)
    whole = loss(output, batch)
    rows = [slice(i, i + 1) for i in range(2)]
    parts = [loss(*jax.tree.map(lambda x, row=row: x[row], (output, batch))) for row in rows]
    for name, term in whole.items():
        for field in ("sum", "weight"):
            added = sum(getattr(part[name], field) for part in parts)
            np.testing.assert_allclose(getattr(term, field), added, rtol=1e-5, atol=1e-6)


def test_a_cost_that_is_no_number_stops_training():
    task = create_task("instances", INFO, slots=4)
    batch = {name: jnp.asarray(value) for name, value in scene().items()}
    output = answer(scene(), 2)
    broken = output.replace(mask_logits=output.mask_logits.at[0, 1, 0, 0].set(jnp.nan))
    assert any(jnp.isnan(term.sum) for term in task.loss(broken, batch).values())


def test_duplicates_are_dropped_and_small_rests_stay_void():
    batch = scene()
    output = answer(batch, 2)
    # Query 2 repeats query 3 with a little less certainty.
    class_logits = output.class_logits.at[0, 2].set(0.9 * output.class_logits[0, 3])
    double = output.replace(
        class_logits=class_logits, mask_logits=output.mask_logits.at[0, 2].set(output.mask_logits[0, 3])
    )
    plain, _ = scores(create_task("instances", INFO), batch, double)
    single, numbers = scores(create_task("instances", INFO, suppress=0.7), batch, double)
    assert (np.asarray(plain["classes"])[0] >= 0).sum() == QUERIES
    assert (np.asarray(single["classes"])[0] == -1).sum() >= 1
    assert numbers["PQ"] == pytest.approx(1)
    # In both, each pixel has one owner, and the repetition owns none.
    for found in (plain, single):
        assert len(np.unique(np.asarray(found["segments"])[0])) == 4


def test_written_files_say_the_same(tmp_path):
    task = create_task("instances", INFO, panoptic=True)
    batch = scene()
    predictions, _ = scores(task, batch, answer(batch, 3))
    one = {name: np.asarray(value)[0] for name, value in predictions.items() if name != "truth"}
    paths = task.write(batch["image"][0], one, tmp_path, "a", {"image": "a.png"})
    assert [path.name for path in paths] == list(task.file_names("a")) and all(path.exists() for path in paths)
    numbers = np.asarray(Image.open(paths[0]))
    report = json.loads(paths[2].read_text())
    assert numbers.dtype == np.uint16 and set(np.unique(numbers)) - {0} == {s["id"] for s in report["segments_info"]}
    for segment in report["segments_info"]:
        mask = numbers == segment["id"]
        assert segment["area"] == mask.sum()
        assert segment["bbox"] == coco.toBbox(coco.encode(np.asfortranarray(mask.astype(np.uint8)))).tolist()
        assert (batch["labels"][0][mask] == segment["category_id"]).all()
        assert segment["isthing"] == (CLASSES[segment["category_id"]] != "sky")
    for annotation in report["annotations"]:
        assert coco.area(annotation["segmentation"]) == annotation["area"]


def test_the_sheet_is_a_picture():
    task = create_task("instances", INFO)
    batch = scene()
    predictions, _ = scores(task, batch, answer(batch, 2))
    examples = [
        {"id": str(i), "image": batch["image"][i]}
        | {f"predicted_{k}": jax.tree.map(lambda x, i=i: np.asarray(x)[i], v) for k, v in predictions.items()}
        for i in range(2)
    ]
    sheet = np.asarray(task.sheet(examples))
    assert sheet.shape[1] > 100 and sheet.std() > 10


@pytest.mark.parametrize(
    "options,said",
    [
        ({"things": ("cot",)}, "did you mean"),
        ({"rules": "kitti"}, "rules"),
        ({"threshold": 2.0}, "threshold"),
        ({"dice_weight": 0.0}, "Masks teach nothing"),
        ({"fixed_size": (3, 0)}, "fixed_size"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        create_task("instances", INFO, **options)


def test_a_model_of_other_classes_is_refused():
    task = create_task("instances", INFO)
    batch = scene()
    with pytest.raises(UserError, match="3 classes of objects apart, the data has 2"):
        task.decode(lambda images: answer(batch, 3), batch)


def test_an_object_without_a_name_gets_no_label():
    """One class and no score: the outline says all, and no empty label covers a corner of the object."""
    image, ids = np.full((24, 24, 3), 90, np.uint8), np.zeros((24, 24), np.int32)
    ids[8:16, 8:16] = 1
    bare, unnamed, named = (np.asarray(outlined(image, ids, names, (96, 96))) for names in ({}, {1: ""}, {1: "8"}))
    np.testing.assert_array_equal(bare, unnamed)
    assert (named != bare).any()
