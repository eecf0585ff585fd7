"""Augmentation on the device: exact geometry, OpenCV's colours, and randomness that belongs to the example alone."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_densevit.data.augment import augment, hsv_to_rgb, normalise, photometric_distortion, rgb_to_hsv
from jax_densevit.errors import UserError

# What cv2.cvtColor (4.12 and 5.0) gives for rows of these colours: (RGB, HSV, and back to RGB).
OPENCV = [
    ((207, 21, 45), (176, 229, 207), (207, 21, 45)),
    ((60, 46, 205), (123, 198, 205), (61, 45, 205)),
    ((222, 149, 10), (20, 244, 222), (222, 151, 9)),
    ((24, 85, 110), (99, 199, 110), (24, 84, 110)),
    ((159, 122, 67), (18, 148, 159), (159, 122, 66)),
    ((40, 177, 188), (92, 201, 188), (39, 178, 188)),
    ((8, 29, 115), (114, 237, 115), (8, 29, 115)),
    ((100, 227, 132), (68, 143, 227), (99, 227, 133)),
    ((107, 110, 170), (119, 95, 170), (106, 108, 170)),
    ((150, 44, 188), (142, 195, 188), (149, 44, 188)),
    ((0, 0, 0), (0, 0, 0), (0, 0, 0)),
    ((255, 255, 255), (0, 0, 255), (255, 255, 255)),
    ((255, 0, 1), (0, 255, 255), (255, 0, 0)),
    ((3, 3, 3), (0, 0, 3), (3, 3, 3)),
    ((10, 200, 10), (60, 242, 200), (10, 200, 10)),
    ((1, 0, 2), (135, 255, 2), (1, 0, 2)),
]


def a_batch(count=64, height=12, width=12, seed=0):
    """Images whose pixels are all different places: labels and instances are functions of the image."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (count, height, width, 3)).astype(np.uint8)
    return {
        "image": image,
        "labels": image[..., 0] % 7,
        "instances": image[..., 1].astype(np.uint16) * 200,
        "amodal": image[..., 2].astype(np.uint16) * 99,
        "seed": rng.integers(0, 2**32, (count, 2), np.uint32),
        "index": np.arange(count, dtype=np.int32),
    }


def run(batch, **options):
    return jax.tree.map(np.asarray, jax.jit(lambda b: augment(b, **options))(batch))


def assert_joint(batch):
    """Labels and instances still belong to their pixels."""
    np.testing.assert_array_equal(batch["labels"], batch["image"][..., 0] % 7)
    np.testing.assert_array_equal(batch["instances"], batch["image"][..., 1].astype(np.uint16) * 200)
    np.testing.assert_array_equal(batch["amodal"], batch["image"][..., 2].astype(np.uint16) * 99)


class TestGeometry:
    def test_nothing_asked_nothing_changed(self):
        batch = a_batch()
        batch["size"] = np.full((64, 2), 12, np.int32)
        out = run(batch)
        assert out.keys() == batch.keys()
        for name in batch:
            np.testing.assert_array_equal(out[name], batch[name])

    @pytest.mark.parametrize(("option", "axis"), [("flip", 2), ("vertical_flip", 1)])
    def test_flips(self, option, axis):
        batch = a_batch(256)
        out = run(batch, **{option: 0.25})
        assert_joint(out)
        mirrored = np.flip(batch["image"], axis)
        flipped = (out["image"] == mirrored).all((1, 2, 3))
        assert ((out["image"] == batch["image"]).all((1, 2, 3)) ^ flipped).all()
        assert abs(flipped.mean() - 0.25) < 0.1
        np.testing.assert_array_equal(run(batch, **{option: 1.0})["image"], mirrored)

    def test_rotation_takes_all_four_turns(self):
        batch = a_batch(256)
        out = run(batch, rotate90=True)
        assert_joint(out)
        turns = np.stack([(out["image"] == np.rot90(batch["image"], k, (1, 2))).all((1, 2, 3)) for k in range(4)])
        assert (turns.sum(0) == 1).all()
        assert (np.abs(turns.mean(1) - 0.25) < 0.1).all()

    def test_all_together_reach_the_eight_poses_of_a_square(self):
        batch = a_batch(400)
        batch["image"][:] = batch["image"][:1]
        batch |= {"labels": batch["image"][..., 0] % 7, "instances": batch["image"][..., 1].astype(np.uint16) * 200}
        batch["amodal"] = batch["image"][..., 2].astype(np.uint16) * 99
        out = run(batch, flip=0.5, vertical_flip=0.5, rotate90=True)
        assert_joint(out)
        assert len({image.tobytes() for image in out["image"]}) == 8

    def test_rotation_of_rectangles_is_refused(self):
        with pytest.raises(UserError, match="rotate90 needs square crops, but they are 8x12"):
            augment(a_batch(2, 8, 12), rotate90=True)

    def test_padding_stays_where_it_is(self):
        batch = a_batch(40, 9, 11)
        sizes = np.stack([np.arange(40) % 9 + 1, np.arange(40) % 11 + 1], 1).astype(np.int32)
        for i, (height, width) in enumerate(sizes):
            batch["labels"][i, height:] = batch["labels"][i, :, width:] = 255
            batch["image"][i, height:] = batch["image"][i, :, width:] = 77
        out = run(batch | {"size": sizes}, flip=1.0, vertical_flip=1.0, photometric=True)
        plain = run(batch | {"size": sizes}, flip=1.0, vertical_flip=1.0)
        for i, (height, width) in enumerate(sizes):
            np.testing.assert_array_equal(
                plain["image"][i, :height, :width], batch["image"][i, :height, :width][::-1, ::-1]
            )
            np.testing.assert_array_equal(
                plain["labels"][i, :height, :width], batch["labels"][i, :height, :width][::-1, ::-1]
            )
            for result in (out, plain):
                assert (result["image"][i, height:] == 77).all() and (result["image"][i, :, width:] == 77).all()
                assert (result["labels"][i, height:] == 255).all() and (result["labels"][i, :, width:] == 255).all()

    def test_padding_stays_where_it_is_when_images_turn(self):
        batch = a_batch(200, 10, 10)
        batch["size"] = np.stack([np.arange(200) % 10 + 1, np.arange(200) // 10 % 10 + 1], 1).astype(np.int32)
        for i, (height, width) in enumerate(batch["size"]):
            batch["image"][i, height:] = batch["image"][i, :, width:] = 77
        out = run(batch, rotate90=True)
        seen = set()
        for i, (height, width) in enumerate(batch["size"]):
            inner = batch["image"][i, :height, :width]
            rows, columns = out["size"][i]
            turns = [k for k in range(4) if np.array_equal(np.rot90(inner, k), out["image"][i, :rows, :columns])]
            assert turns, "what is no padding lies in the top left corner, turned"
            seen |= set(turns) if len(turns) == 1 else set()
            assert (out["image"][i, rows:] == 77).all() and (out["image"][i, :, columns:] == 77).all()
        assert seen == {0, 1, 2, 3}


class TestColors:
    def test_opencv_values(self):
        rgb, hsv, back = (np.array(column) for column in zip(*OPENCV, strict=True))
        np.testing.assert_array_equal(np.stack(rgb_to_hsv(jnp.asarray(rgb, jnp.int32)), -1), hsv)
        ours = np.asarray(hsv_to_rgb(*jnp.asarray(hsv, jnp.int32).T))
        assert (ours >= back).all() and (ours - back).max() <= 1  # float32 may lose 1 where the result is whole
        assert (ours == back).mean() > 0.9

    def test_hsv_is_what_colorsys_says(self):
        rgb = np.random.default_rng(0).integers(0, 256, (500, 3))
        ours = np.stack(rgb_to_hsv(jnp.asarray(rgb, jnp.int32)), -1)
        exact = np.array([colorsys.rgb_to_hsv(*(color / 255)) for color in rgb]) * (180, 255, 255)
        difference = np.abs(ours - exact)
        difference[:, 0] = np.minimum(difference[:, 0], 180 - difference[:, 0])
        assert difference.max() < 0.67  # rounding, and 12 bits of fixed point
        again = np.asarray(hsv_to_rgb(*jnp.asarray(ours, jnp.int32).T))
        exact = np.array([colorsys.hsv_to_rgb(h / 180, s / 255, v / 255) for h, s, v in ours]) * 255
        assert (again <= exact + 1e-6).all() and (exact - again < 1 + 1e-6).all()


def reference_distortion(image, draws):
    """The recipe one image at a time, in NumPy, with plain ifs: what SETR's data pipeline does to a uint8 image."""
    draws = draws.astype(np.float32)

    def to_uint8(x):
        return np.clip(x, 0, 255).astype(np.uint8)

    def contrast(x):
        return to_uint8(x.astype(np.float32) * np.float32(0.5 + draws[4])) if draws[3] < 0.5 else x

    def to_hsv(x):
        r, g, b = x.astype(np.int64).transpose(2, 0, 1)
        v = np.max(x, -1).astype(np.int64)
        spread = v - np.min(x, -1)
        with np.errstate(divide="ignore"):
            sdiv = np.where(v == 0, 0, np.rint(255 * 4096 / v))
            hdiv = np.where(spread == 0, 0, np.rint(180 * 4096 / (6.0 * spread)))
        h = np.select([v == r, v == g], [g - b, b - r + 2 * spread], r - g + 4 * spread)
        h = np.floor((h * hdiv + 2048) / 4096)
        return np.stack([h + 180 * (h < 0), np.floor((spread * sdiv + 2048) / 4096), v], -1).astype(np.int64)

    def to_rgb(hsv):
        out = np.empty(hsv.shape, np.uint8)
        for place in np.ndindex(hsv.shape[:2]):
            h, s, v = (int(value) for value in hsv[place])
            p, q, t = v * (255 - s) // 255, v * (7650 - s * (h % 30)) // 7650, v * (7650 - s * (30 - h % 30)) // 7650
            out[place] = [(v, t, p), (q, v, p), (p, v, t), (p, q, v), (t, p, v), (v, p, q)][h // 30]
        return out

    if draws[0] < 0.5:
        image = to_uint8(image + np.float32((2 * draws[1] - 1) * 32))
    if draws[2] < 0.5:
        image = contrast(image)
    if draws[5] < 0.5:
        hsv = to_hsv(image)
        hsv[..., 1] = to_uint8(hsv[..., 1].astype(np.float32) * np.float32(0.5 + draws[6]))
        image = to_rgb(hsv)
    if draws[7] < 0.5:
        hsv = to_hsv(image)
        hsv[..., 0] = (hsv[..., 0] + int(np.floor(draws[8] * 36)) - 18) % 180
        image = to_rgb(hsv)
    return image if draws[2] < 0.5 else contrast(image)


class TestPhotometric:
    def test_against_the_recipe_in_numpy(self):
        rng = np.random.default_rng(1)
        images = rng.integers(0, 256, (64, 7, 6, 3)).astype(np.uint8)
        draws = rng.random((64, 9), np.float32)
        ours = np.asarray(jax.jit(photometric_distortion)(images, draws))
        assert ours.dtype == np.uint8
        for image, draw, result in zip(images, draws, ours, strict=True):
            np.testing.assert_array_equal(result, reference_distortion(image, draw))

    def test_each_step_happens_half_the_time(self):
        batch = a_batch(400, 4, 4)
        batch["image"][:] = (120, 90, 60)
        out = run(batch, photometric=True)["image"]
        unchanged = (out == batch["image"]).all((1, 2, 3)).mean()
        assert 0.03 < unchanged < 0.14  # 1/16, a little more where a factor close to 1 rounds away
        assert (out == out[:, :1, :1]).all(), "one draw for the whole image"
        assert 90 < out[..., 0].mean() < 150

    def test_labels_are_left_alone(self):
        batch = a_batch()
        out = run(batch, photometric=True)
        for name in ("labels", "instances", "seed", "index"):
            np.testing.assert_array_equal(out[name], batch[name])


EVERYTHING = {"flip": 0.5, "vertical_flip": 0.5, "rotate90": True, "photometric": True}


def test_an_example_does_not_depend_on_its_batch():
    batch = a_batch(16)
    whole = run(batch, **EVERYTHING)
    for rows in ([3], [15, 0, 7, 3]):
        part = run({name: x[rows] for name, x in batch.items()}, **EVERYTHING)
        for name in part:
            np.testing.assert_array_equal(part[name], whole[name][rows])


def test_sharded_over_devices_it_is_the_same():
    batch = a_batch(16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    whole, parts = run(batch, **EVERYTHING), run(sharded, **EVERYTHING)
    for name in whole:
        np.testing.assert_array_equal(parts[name], whole[name])


def test_normalise():
    image = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3)).astype(np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = normalise(jnp.asarray(image), mean, std)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, (image / 255.0 - mean) / std, atol=2e-6)
    # The padding's colour is the mean: 0 within half a step of uint8.
    fill = np.array([[124, 116, 104]], np.uint8)
    assert np.abs(normalise(jnp.asarray(fill), mean, std)).max() <= 0.5 / 255 / 0.224
