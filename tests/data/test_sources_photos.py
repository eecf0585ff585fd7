"""Photographs without labels: the bundled ones, and folders of one's own."""

import logging
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jax_densevit.data.inspection import inspect
from jax_densevit.data.pipeline import evaluation_plan, evaluation_stream, train_stream
from jax_densevit.data.sources import create_source
from jax_densevit.data.sources.sample_photos import PLACES
from jax_densevit.errors import UserError


def test_sample_photos_are_there_without_a_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("no photo may be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    seen = []
    for split, count in (("train", 6), ("val", 1), ("test", 1)):
        source = create_source("sample_photos", split=split)
        assert len(source) == count
        for i in range(count):
            example = source.read(i)
            image = example["image"]
            assert image.dtype == np.uint8 and image.shape == (*source.size(i), 3) and min(image.shape[:2]) >= 300
            assert (image[..., 0] != image[..., 2]).mean() > 0.3
            seen.append(example["id"])
            image[:] = 0  # the reader's own copy
            assert source.read(i)["image"].any()
    assert sorted(seen) == sorted(PLACES), "every photo in exactly one split"
    with pytest.raises(UserError, match="did you mean 'train'"):
        create_source("sample_photos", split="training")


def test_sample_photos_do_not_import_their_packages():
    code = (
        "import sys; from jax_densevit.data.sources import create_source; create_source('sample_photos').read(0);"
        "assert not {'skimage', 'sklearn', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_random_crops_of_sample_photos():
    source = create_source("sample_photos")
    stream = train_stream(source, batch_size=12, seed=1, crop=(48, 64), feeder="threads")
    first, _ = next(stream), stream.close()
    assert set(first) == {"image", "size", "seed", "index"} and first["image"].shape == (12, 48, 64, 3)
    for row in range(6):  # the second epoch crops elsewhere
        again = np.flatnonzero(first["index"][6:] == first["index"][row]) + 6
        assert len(again) == 1 and not np.array_equal(first["image"][row], first["image"][again[0]])


def photo(path, seed, gray=False, size=(20, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(np.repeat(image[..., :1], 3, 2) if gray else image).save(path)


@pytest.fixture
def folder(tmp_path):
    for i in range(200):
        photo(tmp_path / f"photos/{'ab'[i % 2]}/{i:03}.png", i, gray=i in (7, 11, 190))
    return tmp_path / "photos"


def test_split_by_hash_is_stable_and_complete(folder, caplog):
    with caplog.at_level(logging.WARNING):
        parts = {
            split: create_source("photo_folder", root=str(folder), split=split) for split in ("train", "val", "test")
        }
    assert len({name for part in parts.values() for name in part.paths}) == sum(map(len, parts.values())) == 197
    assert sum(len(part.left_out) for part in parts.values()) == 3
    assert caplog.text.count("gray and left out") == sum(bool(part.left_out) for part in parts.values())
    assert 8 <= len(parts["val"]) <= 35 and 8 <= len(parts["test"]) <= 35
    kept = set(parts["val"].paths)
    (folder / "a/000.png").unlink()
    photo(folder / "new.png", 1000)
    after = set(create_source("photo_folder", root=str(folder), split="val").paths)
    assert kept - after <= {"a/000"} and after - kept <= {"new"}
    assert len(create_source("photo_folder", root=str(folder), split="train", val_share=0.5)) < 110
    everything = create_source("photo_folder", root=str(folder), gray="keep")
    assert len(everything) == 200 and not everything.left_out


def test_split_by_subfolders(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            photo(tmp_path / split / f"class/{i}.jpg", i)
    assert len(create_source("photo_folder", root=str(tmp_path), split="train")) == 3
    source = create_source("photo_folder", root=str(tmp_path), split="val")
    assert [source.read(i)["id"] for i in range(2)] == ["val/class/0", "val/class/1"]
    with pytest.raises(UserError, match="no folder 'test'"):
        create_source("photo_folder", root=str(tmp_path), split="test")


def test_a_list_picks_and_orders(folder, tmp_path):
    chosen = tmp_path / "list.txt"
    chosen.write_text("# mine\nb/003.png\na/002\n./a/000.png\n")
    source = create_source("photo_folder", root=str(folder), list_file=str(chosen))
    assert list(source.paths) == ["b/003", "a/002", "a/000"]
    chosen.write_text("b/003.png\nb/004.png\n")
    with pytest.raises(UserError, match="line 2: there is no photo 'b/004.png'"):
        create_source("photo_folder", root=str(folder), list_file=str(chosen))


def test_files_of_all_kinds_become_upright_rgb(tmp_path):
    rng = np.random.default_rng(0)
    rgb = np.kron(rng.integers(0, 256, (5, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgb).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(rgb).save(tmp_path / "plain.webp")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot much more")
    source = create_source("photo_folder", root=str(tmp_path))
    assert list(source.left_out) == ["sixteen"] and list(source.paths) == ["broken", "cmyk", "plain", "turned"]
    with pytest.raises(UserError, match="broken.png"):
        source.read(0)
    assert source.size(3) == (32, 40) and source.read(3)["image"].shape == (32, 40, 3)
    for i in (1, 2):
        assert source.read(i)["image"].shape == (40, 32, 3)
        assert np.abs(source.read(i)["image"].astype(int) - rgb).mean() < 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "trian"}, "did you mean 'train'"),
        ({"gray": "skip"}, "gray photographs"),
        ({"val_share": 0.6, "test_share": 0.5}, "must leave something"),
        ({"suffix": ".tif"}, "no photo"),
        ({"list_file": "none.txt"}, "none.txt cannot be read"),
    ],
)
def test_wrong_options_are_named(folder, options, message):
    with pytest.raises(UserError, match=message):
        create_source("photo_folder", root=str(folder), **options)


def test_only_gray_photos_are_refused(tmp_path):
    photo(tmp_path / "a.png", 0, gray=True)
    with pytest.raises(UserError, match="All 1 photos .* gray"):
        create_source("photo_folder", root=str(tmp_path))


def test_evaluation_and_check_data_do_without_labels(tmp_path):
    for i, size in enumerate([(20, 24), (24, 20), (20, 24)]):
        photo(tmp_path / f"{i}.png", i, size=size)
    photo(tmp_path / "gray.png", 9, gray=True)
    source = create_source("photo_folder", root=str(tmp_path))
    batches = list(evaluation_stream(source, evaluation_plan(source, 2)))
    assert [batch["mask"].tolist() for batch in batches] == [[True, True], [True, False]]
    assert all(set(batch) == {"image", "index", "mask"} for batch in batches)
    report = inspect(source, crop=(16, 16))
    assert report.read == 3 and len(report.sizes) == 2 and not report.values
    assert [(finding.kind, finding.severity) for finding in report.findings] == [("gray", "warning")]
    assert "1 gray photo is" in report.findings[0].message and report.findings[0].files
