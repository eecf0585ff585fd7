"""Training and evaluation streams: both feeders, any host count, any start, every kind of bad input."""

import itertools
import logging
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_densevit.data import order, pipeline
from jax_densevit.data.crops import RandomCrop, nearest, scaled_size, uniforms
from jax_densevit.data.pipeline import evaluation_plan, evaluation_stream, train_stream
from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError

FEEDERS = pytest.mark.parametrize("feeder", ["threads", "tensorflow"])
FILL = (124, 116, 104)  # the mean colour of ImageNet


class Memory:
    """Examples whose pixels say where they are: red = row, green = column, blue = example; labels follow from both."""

    def __init__(self, sizes, bad=(), instances=True, classes=5):
        self.info = DataInfo("memory", tuple("abcde"[:classes]), ((0, 0, 0),) * classes)
        self.sizes, self.bad, self.instances, self.classes = list(sizes), set(bad), instances, classes
        self.reads = 0

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return self.sizes[index]

    def read(self, index):
        self.reads += 1
        if index in self.bad:
            raise UserError(f"file{index}.png: this file is empty; fetch it again.")
        rows, columns = np.mgrid[: self.sizes[index][0], : self.sizes[index][1]]
        image = np.stack([rows, columns, np.full_like(rows, index)], -1).astype(np.uint8)
        example = {"image": image, "labels": label_of(rows, columns, self.classes), "id": f"file{index}.png"}
        if self.instances:
            example["instances"] = (1000 + rows).astype(np.uint16)
        return example


def label_of(rows, columns, classes=5):
    return ((rows // 3 + columns // 5) % classes).astype(np.uint8)


def take(stream, count):
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
            assert a[name].dtype == b[name].dtype, name


SAME_SIZE = Memory([(20, 24)] * 7)
ANY_SIZE = Memory([(20, 24), (40, 16), (9, 11), (30, 33), (16, 64)])
MODES = {
    "whole": (SAME_SIZE, {}),
    "crop": (ANY_SIZE, {"crop": (16, 18)}),
    "class ratio": (ANY_SIZE, {"crop": (8, 8), "max_class_ratio": 0.4}),
    "resize": (
        ANY_SIZE,
        {"crop": (16, 18), "resize_box": (40, 25), "resize_ratio": (0.5, 2.0), "max_class_ratio": 0.4},
    ),
}


class TestTrainStream:
    @FEEDERS
    def test_what_a_batch_holds(self, feeder):
        batch = take(train_stream(SAME_SIZE, batch_size=3, seed=1, feeder=feeder), 1)[0]
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
            "image": ((3, 20, 24, 3), np.uint8),
            "labels": ((3, 20, 24), np.uint8),
            "instances": ((3, 20, 24), np.uint16),
            "seed": ((3, 2), np.uint32),
            "index": ((3,), np.int32),
        }
        for row, index in enumerate(batch["index"]):
            example = SAME_SIZE.read(int(index))
            for name in ("image", "labels", "instances"):
                np.testing.assert_array_equal(batch[name][row], example[name])

    @FEEDERS
    def test_the_order_is_that_of_order_py(self, feeder):
        batches = take(train_stream(SAME_SIZE, batch_size=3, seed=9, feeder=feeder), 7)
        expected, epoch = order.examples_at(np.arange(21), 9, 7)
        np.testing.assert_array_equal(np.concatenate([b["index"] for b in batches]), expected)
        np.testing.assert_array_equal(
            np.concatenate([b["seed"] for b in batches]), order.augmentation_seeds(9, epoch, expected)
        )

    @pytest.mark.parametrize("mode", ["whole", "crop", "class ratio"])
    def test_both_feeders_and_any_number_of_threads_give_the_same(self, mode):
        source, options = MODES[mode]
        streams = [
            take(train_stream(source, batch_size=4, seed=2, feeder=feeder, threads=threads, **options), 6)
            for feeder, threads in (("threads", 1), ("threads", 5), ("tensorflow", 3))
        ]
        assert_same(streams[0], streams[1])
        assert_same(streams[0], streams[2])

    @pytest.mark.parametrize("mode", MODES)
    def test_a_later_start_is_the_tail_of_the_stream(self, mode):
        source, options = MODES[mode]
        whole = take(train_stream(source, batch_size=4, seed=2, threads=2, **options), 9)
        for start in (1, 5):
            assert_same(
                take(train_stream(source, batch_size=4, seed=2, start_step=start, **options), 9 - start), whole[start:]
            )

    @pytest.mark.parametrize("mode", MODES)
    def test_hosts_in_turn_are_the_global_batch(self, mode):
        source, options = MODES[mode]
        whole = take(train_stream(source, batch_size=6, seed=2, **options), 4)
        parts = [
            take(train_stream(source, batch_size=6, seed=2, process_index=h, process_count=3, **options), 4)
            for h in range(3)
        ]
        joined = [
            {name: np.concatenate([p[name] for p in step]) for name in step[0]} for step in zip(*parts, strict=True)
        ]
        assert_same(joined, whole)

    def test_an_example_does_not_depend_on_its_batch(self):
        source, options = MODES["resize"]
        small = take(train_stream(source, batch_size=2, seed=2, **options), 6)
        large = take(train_stream(source, batch_size=12, seed=2, **options), 1)
        assert_same([{name: np.concatenate([b[name] for b in small]) for name in small[0]}], large)

    @FEEDERS
    def test_a_far_step_starts_at_once(self, feeder):
        take(train_stream(SAME_SIZE, batch_size=8, seed=0, feeder=feeder), 1)
        started = time.perf_counter()
        batch = take(train_stream(SAME_SIZE, batch_size=8, seed=0, feeder=feeder, start_step=10**7), 1)[0]
        assert time.perf_counter() - started < 3
        np.testing.assert_array_equal(batch["index"], order.examples_at(10**7 * 8 + np.arange(8), 0, 7)[0])

    @FEEDERS
    def test_closing_ends_it(self, feeder):
        stream = train_stream(SAME_SIZE, batch_size=2, seed=0, feeder=feeder)
        next(stream)
        stream.close()
        stream.close()
        with pytest.raises(StopIteration):
            next(stream)
        time.sleep(0.2)
        reads = SAME_SIZE.reads
        time.sleep(0.2)
        assert SAME_SIZE.reads == reads, "still reading"
        assert not [
            t for t in threading.enumerate() if t.name.startswith("jax_densevit_read") and feeder == "tensorflow"
        ]

    def test_importing_and_feeding_by_threads_leaves_tensorflow_alone(self):
        code = """
import sys
from jax_densevit.data.pipeline import train_stream
from jax_densevit.data.sources import create_source
stream = train_stream(create_source("digit_scenes"), batch_size=2, seed=0, feeder="threads")
next(stream); stream.close()
assert "tensorflow" not in sys.modules
sys.modules["tensorflow"] = None  # as where it is not installed
import importlib.util; importlib.util.find_spec = lambda name: None
next(train_stream(create_source("digit_scenes"), batch_size=2, seed=0))
try:
    train_stream(create_source("digit_scenes"), batch_size=2, seed=0, crop=(8, 8), resize_box=(9, 9))
except Exception as error:
    print(type(error).__name__, error)
"""
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert run.returncode == 0 and run.stderr == "", run.stderr
        assert run.stdout.startswith("UserError") and "install tensorflow-cpu" in run.stdout


class TestCrops:
    def test_a_crop_is_a_window_of_the_image_with_its_labels(self):
        places = set()
        for batch in take(train_stream(ANY_SIZE, batch_size=5, seed=4, crop=(8, 10), feeder="threads"), 40):
            for image, labels, instances, index in zip(
                *(batch[k] for k in ("image", "labels", "instances", "index")), strict=True
            ):
                y, x = image[0, 0, :2]
                np.testing.assert_array_equal(image[..., 0], np.repeat(y + np.arange(8)[:, None], 10, 1))
                np.testing.assert_array_equal(image[..., 1], np.repeat(x + np.arange(10)[None], 8, 0))
                assert (image[..., 2] == index).all()
                np.testing.assert_array_equal(labels, label_of(image[..., 0].astype(int), image[..., 1].astype(int)))
                np.testing.assert_array_equal(instances, 1000 + image[..., 0].astype(int))
                places.add((int(index), int(y), int(x)))
        # Every place of the image is reached: 9x11 has 2x2 of them.
        assert {place[1:] for place in places if place[0] == 2} == {(0, 0), (0, 1), (1, 0), (1, 1)}

    @FEEDERS
    def test_small_images_are_padded_at_the_bottom_and_on_the_right(self, feeder):
        source = Memory([(6, 5)] * 3)
        batch = take(train_stream(source, batch_size=3, seed=4, crop=(8, 9), feeder=feeder), 1)[0]
        np.testing.assert_array_equal(batch["size"], [[6, 5]] * 3)
        np.testing.assert_array_equal(batch["image"][0, :6, :5], source.read(int(batch["index"][0]))["image"])
        assert (batch["image"][:, 6:] == FILL).all() and (batch["image"][:, :, 5:] == FILL).all()
        assert (batch["labels"][:, 6:] == 255).all() and (batch["labels"][:, :, 5:] == 255).all()
        assert (batch["labels"][:, :6, :5] != 255).all()
        assert (batch["instances"][:, 6:] == 0).all() and (batch["instances"][:, :, 5:] == 0).all()

    def test_class_ratio(self):
        """An image of class 0 with a stripe of class 1: ten tries for a crop that sees enough of it, then anything."""
        labels = np.zeros((64, 200), np.uint8)
        labels[:, 100:104] = 1
        labels[:, 104:110] = 255
        example = {"image": np.zeros((64, 200, 3), np.uint8), "labels": labels, "id": "stripe"}
        shares = {}
        for ratio in (1.0, 0.75, 0.5):
            cut = RandomCrop((16, 16), max_class_ratio=ratio)
            crops = [cut(example, (7, i))["labels"] for i in range(400)]
            counts = np.array([[(c == 0).sum(), (c == 1).sum()] for c in crops])
            shares[ratio] = np.mean((counts.min(1) > 0) & (counts.max(1) < ratio * counts.sum(1)))
        # A window sees enough of the stripe for 0.75 in 13 of 185 places: 1 - (1 - p)^11 of the crops are good.
        widths = np.array([(labels[0, x : x + 16, None] == (0, 1)).sum(0) for x in range(185)])
        good = np.mean((widths.min(1) > 0) & (widths.max(1) < 0.75 * widths.sum(1)))
        assert abs(shares[0.75] - (1 - (1 - good) ** 11)) < 0.08
        assert shares[1.0] < shares[0.75]

    def test_one_class_only_ends_after_the_tries(self):
        example = {"image": np.zeros((64, 64, 3), np.uint8), "labels": np.zeros((64, 64), np.uint8), "id": "flat"}
        seen = {tuple(RandomCrop((16, 16), max_class_ratio=0.75)(example, (1, i))["size"]) for i in range(5)}
        assert seen == {(16, 16)}


class TestResize:
    @pytest.mark.parametrize(
        ("size", "box", "ratio", "expected"),
        [
            ((1024, 2048), (2049, 1025), 1.0, (1025, 2049)),  # Cityscapes at its base scale
            ((512, 683), (2048, 512), 1.0, (512, 683)),  # a typical image of ADE20K
            ((683, 512), (2048, 512), 0.5, (342, 256)),
            ((100, 1000), (2048, 512), 1.0, (205, 2048)),  # elongated: the longer side decides
            ((333, 500), (520, 520), 2.0, (693, 1040)),
            ((1, 900), (64, 64), 0.5, (1, 32)),
        ],
    )
    def test_scaled_size(self, size, box, ratio, expected):
        assert scaled_size(size, box, ratio) == expected

    def test_labels_take_the_nearest_pixel_centre(self):
        labels = np.arange(7 * 5).reshape(7, 5)
        for scaled in ((7, 5), (14, 10), (3, 2), (10, 4), (21, 15)):
            rows = np.floor((np.arange(scaled[0]) + 0.5) * 7 / scaled[0]).astype(int)
            columns = np.floor((np.arange(scaled[1]) + 0.5) * 5 / scaled[1]).astype(int)
            whole = labels[np.ix_(rows, columns)]
            np.testing.assert_array_equal(nearest(labels, scaled, (0, 0, *scaled)), whole)
            np.testing.assert_array_equal(nearest(labels, scaled, (1, 1, 2, 1)), whole[1:3, 1:2])

    def test_the_image_is_the_whole_image_resized_and_then_cropped(self):
        """Against bilinear interpolation of the whole image in float64: what differs is the rounding to uint8."""

        class Photos(Memory):
            def read(self, index):
                example = super().read(index)
                rng = np.random.default_rng(index)
                return example | {"image": rng.integers(0, 256, (*self.sizes[index], 3)).astype(np.uint8)}

        source = Photos([(60, 70), (40, 160), (90, 30)])
        options = {"crop": (32, 40), "resize_box": (80, 60), "resize_ratio": (0.5, 2.0)}
        cut = RandomCrop((32, 40), (80, 60), (0.5, 2.0))
        scales = []
        for batch in take(train_stream(source, batch_size=3, seed=5, **options), 8):
            for row, index in enumerate(batch["index"]):
                example = source.read(int(index))
                seed = tuple(batch["seed"][row].tolist())
                draws = uniforms(seed)
                scaled = scaled_size(example["image"].shape[:2], (80, 60), 0.5 + 1.5 * next(draws))
                scales.append(scaled[0] / example["image"].shape[0])
                whole = bilinear(example["image"], scaled)
                (y, x, height, width), _ = cut._window(scaled, None, draws)
                assert (height, width) == tuple(batch["size"][row]) == tuple(cut(example, seed)["size"])
                ours = batch["image"][row, :height, :width].astype(float)
                assert np.abs(ours - whole[y : y + height, x : x + width]).max() <= 0.505
                assert (batch["image"][row, height:] == FILL).all() and (batch["image"][row, :, width:] == FILL).all()
        assert min(scales) < 0.7 and max(scales) > 1.4

    def test_labels_stay_under_the_image_and_are_never_mixed(self):
        source = Memory([(40, 60)] * 4, classes=2)
        for batch in take(
            train_stream(source, batch_size=4, seed=1, crop=(48, 48), resize_box=(60, 40), resize_ratio=(0.5, 2.0)), 10
        ):
            inside = batch["labels"] != 255
            assert set(np.unique(batch["labels"])) <= {0, 1, 255}
            # Red holds the source row, resized; instances hold 1000 + the nearest source row.
            difference = (batch["instances"].astype(int) - 1000 - batch["image"][..., 0])[inside]
            assert np.abs(difference).max() <= 1

    def test_thin_images(self):
        source = Memory([(1, 90), (90, 1), (1, 1), (2, 200)])
        options = {"crop": (8, 8), "resize_box": (64, 16), "resize_ratio": (0.1, 1.0)}
        for batch in take(train_stream(source, batch_size=4, seed=1, **options), 10):
            assert (batch["size"] >= 1).all() and (batch["size"] <= 8).all()
            for image, index, (height, width) in zip(batch["image"], batch["index"], batch["size"], strict=True):
                assert (image[:height, :width, 2] == index).all(), "interpolated only within the image"


def bilinear(image, scaled):
    """Half-pixel bilinear resize without antialiasing, float64."""
    out = image.astype(float)
    for axis in (0, 1):
        n = image.shape[axis]
        at = np.clip((np.arange(scaled[axis]) + 0.5) * n / scaled[axis] - 0.5, 0, n - 1)
        low = np.floor(at).astype(int)
        weight = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
        out = np.take(out, low, axis) * (1 - weight) + np.take(out, np.minimum(low + 1, n - 1), axis) * weight
    return out


class TestBadInput:
    @FEEDERS
    def test_an_unreadable_file_ends_the_stream_with_its_name(self, feeder, capfd):
        source = Memory([(8, 8)] * 40, bad=[17])
        stream = train_stream(source, batch_size=4, seed=0, feeder=feeder)
        with pytest.raises(UserError, match="file17.png: this file is empty"):
            for _ in range(10):
                batch = next(stream)
                assert 17 not in batch["index"]
        with pytest.raises(StopIteration):
            next(stream)
        assert "Traceback" not in capfd.readouterr().err

    def test_an_unreadable_file_among_resized_ones(self):
        source = Memory([(8, 8)] * 40, bad=[17])
        with pytest.raises(UserError, match="file17.png: this file is empty"):
            take(train_stream(source, batch_size=4, seed=0, crop=(6, 6), resize_box=(9, 9)), 10)

    @FEEDERS
    def test_skipping_takes_the_next_readable_one_and_counts(self, feeder, caplog):
        source = Memory([(8, 8)] * 60, bad=[3, 4, 17])
        with caplog.at_level(logging.WARNING):
            stream = train_stream(source, batch_size=6, seed=5, feeder=feeder, on_bad="skip")
            assert stream.bad == 0
            indices = [next(stream)["index"] for _ in range(20)]
            assert stream.bad == 3
            stream.close()
        for epoch in range(2):
            permutation = order.epoch_order(5, epoch, 60)
            expected = [next(i for i in np.roll(permutation, -place) if i not in source.bad) for place in range(60)]
            np.testing.assert_array_equal(np.concatenate(indices[10 * epoch : 10 * epoch + 10]), expected)
        assert sum("file17.png" in r.message for r in caplog.records) == 1, "named once"

    @FEEDERS
    def test_a_set_with_many_bad_files_is_given_up(self, feeder):
        stream = train_stream(
            Memory([(8, 8)] * 40, bad=range(10, 14)), batch_size=4, seed=0, feeder=feeder, on_bad="skip"
        )
        with pytest.raises(UserError, match="3 of the 40 training files are unreadable, more than 5%"):
            for _ in range(20):
                next(stream)
        with pytest.raises(UserError, match="file1.png"):
            train_stream(Memory([(8, 8)] * 4, bad=range(4)), batch_size=4, seed=0, feeder=feeder, on_bad="skip")

    @FEEDERS
    def test_a_defect_of_ours_keeps_its_own_exception(self, feeder):
        class Broken(Memory):
            def read(self, index):
                if index == 5:
                    raise ZeroDivisionError("a defect")
                return super().read(index)

        with pytest.raises(ZeroDivisionError, match="a defect"):
            take(train_stream(Broken([(8, 8)] * 9), batch_size=3, seed=0, feeder=feeder), 9)

    def test_images_of_several_sizes_need_a_crop(self):
        with pytest.raises(UserError, match=r"file\d.png has size .* and file0.png has size .*data.crop"):
            take(train_stream(ANY_SIZE, batch_size=5, seed=0, feeder="threads"), 2)

    def test_labels_of_another_size_are_named(self):
        class Shifted(Memory):
            def read(self, index):
                example = super().read(index)
                return example | ({"labels": example["labels"][:-1]} if index == 2 else {})

        source = Shifted([(8, 8)] * 4)
        with pytest.raises(UserError, match=r"file2.png: the labels have .*\(7, 8\).*\(8, 8\)"):
            take(train_stream(source, batch_size=4, seed=0, crop=(4, 4), feeder="threads"), 2)
        with pytest.raises(UserError, match=r"file2.png: the labels have .*\(7, 8\).*\(8, 8\)"):
            list(evaluation_stream(source, evaluation_plan(source, 2)))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 3, "process_count": 2}, "batch_size is 3"),
            ({"on_bad": "ignore"}, "on_bad is 'ignore'"),
            ({"feeder": "magic"}, "feeder is 'magic'"),
            ({"crop": (8, 0)}, "two positive sizes"),
            ({"crop": (8, 8), "resize_box": (-4, 4)}, "two positive sizes"),
            ({"resize_box": (40, 40)}, "and a crop"),
            ({"crop": (8, 8), "resize_box": (40, 40), "resize_ratio": (2, 1)}, "0 < low <= high"),
            ({"crop": (8, 8), "resize_box": (40, 40), "feeder": "threads"}, "needs TensorFlow.*jax_densevit.prepare"),
            ({"max_class_ratio": 0.75}, "max_class_ratio needs data.crop"),
        ],
    )
    def test_options_that_make_no_sense(self, options, message):
        with pytest.raises(UserError, match=message):
            train_stream(SAME_SIZE, **{"batch_size": 2, "seed": 0} | options)

    def test_an_empty_set(self):
        with pytest.raises(UserError, match="no examples"):
            train_stream(Memory([]), batch_size=2, seed=0)
        with pytest.raises(UserError, match="nothing to evaluate"):
            evaluation_plan(Memory([]), 4)
        assert list(evaluation_stream(Memory([]), [])) == []


class TestEvaluation:
    @settings(max_examples=40, deadline=None)
    @given(
        sizes=st.lists(st.sampled_from([(4, 6), (6, 4), (5, 5)]), min_size=1, max_size=20),
        hosts=st.integers(1, 4),
        per_host=st.integers(1, 3),
        limit=st.integers(0, 25),
    )
    def test_every_example_exactly_once(self, sizes, hosts, per_host, limit):
        source = Memory(sizes)
        plan = evaluation_plan(source, hosts * per_host, limit)
        seen = []
        for host in range(hosts):
            batches = list(evaluation_stream(source, plan, threads=2, process_index=host, process_count=hosts))
            assert len(batches) == len(plan), "every host runs the same number of batches"
            for batch, planned in zip(batches, plan, strict=True):
                assert batch["image"].shape == (per_host, *planned.size, 3)
                for row in range(per_host):
                    index = int(batch["index"][row])
                    assert batch["mask"][row] == (index >= 0)
                    if index >= 0:
                        seen.append(index)
                        for name in ("image", "labels", "instances"):
                            np.testing.assert_array_equal(batch[name][row], source.read(index)[name])
                    else:
                        assert (batch["labels"][row] == 255).all() and not batch["instances"][row].any()
        expected = min(limit, len(sizes)) if limit else len(sizes)
        assert sorted(seen) == list(range(expected))

    def test_nothing_is_decoded_to_plan(self):
        source = Memory([(4, 6), (6, 4)] * 3)
        assert evaluation_plan(source, 4) == [
            pipeline.PlannedBatch((4, 6), (0, 2, 4, -1)),
            pipeline.PlannedBatch((6, 4), (1, 3, 5, -1)),
        ]
        assert source.reads == 0

    def test_an_unreadable_file_is_never_left_out(self):
        source = Memory([(4, 4)] * 9, bad=[7])
        with pytest.raises(UserError, match="file7.png"):
            list(evaluation_stream(source, evaluation_plan(source, 2)))

    def test_hosts_that_cannot_share_and_empty_batches(self):
        source = Memory([(4, 4)] * 9)
        with pytest.raises(UserError, match="batch_size is 3"):
            next(evaluation_stream(source, evaluation_plan(source, 3), process_count=2))
        with pytest.raises(UserError, match="must be at least 1"):
            evaluation_plan(source, 0)

    def test_stopping_early_ends_the_threads(self):
        before = threading.active_count()
        stream = evaluation_stream(Memory([(4, 4)] * 99), evaluation_plan(Memory([(4, 4)] * 99), 2), threads=3)
        next(stream)
        stream.close()
        for _ in range(50):
            if threading.active_count() <= before:
                break
            time.sleep(0.05)
        assert threading.active_count() <= before
