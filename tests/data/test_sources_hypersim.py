"""Hypersim from a tiny tree in its published layout: split list, tone map, labels, and what is missing."""

import logging

import h5py
import numpy as np
import pytest
from PIL import Image

from jax_densevit.data.inspection import inspect
from jax_densevit.data.sources import create_source
from jax_densevit.data.sources.hypersim import tone_mapped
from jax_densevit.errors import UserError

SIZE = (6, 8)
FRAMES = (  # scene, camera, frame, public, split
    ("ai_001_001", "cam_00", 0, True, "train"),
    ("ai_001_001", "cam_00", 7, True, "train"),
    ("ai_001_001", "cam_01", 12, False, "train"),
    ("ai_002_003", "cam_00", 3, True, "train"),
    ("ai_010_001", "cam_00", 1, True, "val"),
    ("ai_011_001", "cam_00", 2, True, ""),
)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("dataset", data=array, compression="gzip")


def tree(root, leave_out=()):
    lines = ["scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name"]
    for number, (scene, camera, frame, public, split) in enumerate(FRAMES):
        lines.append(
            f"{scene},{camera},{frame},{public},{'' if public else 'flagged, by hand'},{split}".replace(", ", " ")
        )
        if not public or number in leave_out:
            continue
        images = root / scene / "images"
        rng = np.random.default_rng(number)
        color = rng.gamma(1.0, 2.0, (*SIZE, 3)).astype(np.float16)
        semantic = np.resize(np.array([-1, 1, 2, 40], np.int16), SIZE)
        entities = np.where(semantic == -1, -1, 5).astype(np.int32)
        write(images / f"scene_{camera}_final_hdf5/frame.{frame:04d}.color.hdf5", color)
        write(images / f"scene_{camera}_geometry_hdf5/frame.{frame:04d}.render_entity_id.hdf5", entities)
        write(images / f"scene_{camera}_geometry_hdf5/frame.{frame:04d}.semantic.hdf5", semantic)
        previews = images / f"scene_{camera}_final_preview"
        previews.mkdir(parents=True, exist_ok=True)
        for kind, gray in (("color", 60), ("tonemap", 120)):
            Image.new("RGB", SIZE[::-1], (gray,) * 3).save(previews / f"frame.{frame:04d}.{kind}.jpg")
    (root / "metadata_images_split_scene_v1.csv").write_text("\n".join(lines) + "\n")
    return root


def test_public_frames_of_the_split_in_order(tmp_path):
    source = create_source("hypersim", root=str(tree(tmp_path)), split="train")
    names = ["ai_001_001/cam_00/0000", "ai_001_001/cam_00/0007", "ai_002_003/cam_00/0003"]
    assert [source.read(i)["id"] for i in range(len(source))] == names and source.size(0) == SIZE
    assert source.info.classes[0] == "wall" and source.info.classes[39] == "other prop"
    assert source.info.palette[39] == (100, 85, 144) and len(source.info.palette) == 40
    labels = source.read(1)["labels"]
    np.testing.assert_array_equal(labels, np.resize(np.array([255, 0, 1, 39], np.uint8), SIZE))
    assert labels.dtype == np.uint8
    seen = inspect(source)
    assert seen.read == seen.examples == 3 and not [f for f in seen.findings if f.severity == "error"]


def test_the_kinds_of_image(tmp_path):
    tree(tmp_path)
    for kind, gray in (("tonemap_preview", 120), ("color_preview", 60)):
        source = create_source("hypersim", root=str(tmp_path), split="val", image=kind)
        assert np.abs(source.read(0)["image"].astype(int) - gray).max() <= 1 and source.size(0) == SIZE
    with pytest.raises(UserError, match="did you mean 'tonemapped'"):
        create_source("hypersim", root=str(tmp_path), split="val", image="tonemap")
    small = create_source("hypersim", root=str(tmp_path), split="val", size=(3, 4))
    assert small.read(0)["image"].shape == (3, 4, 3) and small.read(0)["labels"].shape == (3, 4) == small.size(0)


def test_tone_map():
    """By the rule written out per pixel: what was hit decides the exposure, the background only gets it."""
    rng = np.random.default_rng(3)
    radiance = rng.gamma(0.5, 3.0, (40, 50, 3)).astype(np.float16)
    entities = np.where(np.arange(50) < 30, 4, -1)[None].repeat(40, 0)
    radiance[:, 40:] *= 100  # a bright window, not hit
    ours = tone_mapped(radiance, entities)
    linear = radiance.astype(np.float64)
    bright = linear @ (0.3, 0.59, 0.11)
    scale = 0.8**2.2 / np.percentile(bright[entities != -1], 90)
    expected = 255 * np.minimum(scale * linear, 1) ** (1 / 2.2)
    assert ours.dtype == np.uint8 and np.abs(ours - expected).max() <= 0.51
    # In gray radiance, the 90th percentile of what was hit is 0.8 of white.
    gray = np.repeat(radiance[..., :1], 3, axis=2)
    assert abs(np.percentile(tone_mapped(gray, entities)[entities != -1], 90) - 0.8 * 255) <= 1


def test_tone_map_of_darkness_emptiness_and_what_is_no_number():
    dark = np.full((2, 3, 3), 1e-5, np.float16)
    assert not tone_mapped(dark, np.ones((2, 3), int)).any()
    nothing_hit = np.full((2, 3, 3), 0.5, np.float16)
    assert (tone_mapped(nothing_hit, np.full((2, 3), -1)) == round(255 * 0.5 ** (1 / 2.2))).all()
    odd = np.full((20, 3, 3), 1.0, np.float16)
    odd[0, 0], odd[0, 1], odd[0, 2] = np.nan, np.inf, -1.0
    mapped = tone_mapped(odd, np.ones((20, 3), int))
    assert not mapped[0, 0].any() and (mapped[0, 1] == 255).all() and not mapped[0, 2].any() and mapped[1].all()


def test_a_part_of_the_set_must_be_asked_for(tmp_path, caplog):
    tree(tmp_path, leave_out=(3,))
    (tmp_path / "ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0007.semantic.hdf5").unlink()
    with pytest.raises(UserError, match=r"2 of the 3 frames of 'train' .*1 scenes wholly.*frame.0007.semantic.*'skip'"):
        create_source("hypersim", root=str(tmp_path), split="train")
    with caplog.at_level(logging.WARNING):
        source = create_source("hypersim", root=str(tmp_path), split="train", missing="skip")
    assert len(source) == 1 and source.left_out == 2 and "2 of 3 frames" in caplog.text
    # Previews need no final_hdf5.
    for path in tmp_path.glob("ai_010_001/images/*final_hdf5/*"):
        path.unlink()
    assert len(create_source("hypersim", root=str(tmp_path), split="val", image="tonemap_preview")) == 1
    with pytest.raises(UserError, match="1 of the 1 frames of 'val' .*correct root"):
        create_source("hypersim", root=str(tmp_path), split="val", missing="skip")
    tree(tmp_path)
    assert len(create_source("hypersim", root=str(tmp_path), split="train")) == 3, "found as soon as they are there"


def test_bad_files(tmp_path):
    tree(tmp_path)
    file = tmp_path / "ai_010_001/images/scene_cam_00_geometry_hdf5/frame.0001.semantic.hdf5"
    source = create_source("hypersim", root=str(tmp_path), split="val")
    write(file, np.full(SIZE, 41, np.int16))
    with pytest.raises(UserError, match="frame.0001.semantic.hdf5: the id 41 .*belong to no class"):
        source.read(0)
    write(file, np.ones((3, 3), np.int16))
    with pytest.raises(UserError, match="frame.0001.semantic.hdf5 is 3x3"):
        source.read(0)
    file.write_bytes(b"<html>")
    with pytest.raises(UserError, match="frame.0001.semantic.hdf5: no readable HDF5"):
        source.read(0)
    (tmp_path / "metadata_images_split_scene_v1.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="lacks the columns scene_name"):
        create_source("hypersim", root=str(tmp_path), split="val")
    with pytest.raises(UserError, match="no folder"):
        create_source("hypersim", root=str(tmp_path / "nowhere"), split="val")


def test_without_h5py_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(UserError, match="pip install h5py"):
        create_source("hypersim", root=str(tmp_path), split="val")
