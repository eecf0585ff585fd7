"""Your own folders: pairing by name and by list, what mask values mean, and every trap named."""

import concurrent.futures

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from jax_densevit.data.class_names import VOC2012_PALETTE, default_palette
from jax_densevit.data.label_maps import LabelMap
from jax_densevit.data.sources.registry import create_source
from jax_densevit.errors import UserError

THREE = ("sky", "tree", "road")


def image(path, size=(6, 8), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def mask(path, values, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(values))
    if palette is not None:
        picture = Image.fromarray(np.asarray(values, np.uint8))
        picture.putpalette([part for color in palette for part in color])
    picture.save(path)


def ids(*values, size=(6, 8), dtype=np.uint8):
    """A mask that holds exactly these values, every one at least once."""
    return np.resize(np.array(values, dtype), size)


def folder(root, masks, suffix=".png", **options):
    for i, values in enumerate(masks):
        image(root / f"images/{i:02d}.png", np.asarray(values).shape[:2], i)
        mask(root / f"labels/{i:02d}{suffix}", values)
    return create_source(
        "paired_folder", images=str(root / "images"), labels=str(root / "labels"), **{"classes": THREE, **options}
    )


def test_reads_pairs_as_they_are(tmp_path):
    first = image(tmp_path / "set/images/a/Straße 1.JPG.png", seed=1)
    mask(tmp_path / "set/labels/a/Straße 1.JPG.png", ids(0, 1, 2, 255))
    image(tmp_path / "set/images/b.JPG", (5, 9))
    mask(tmp_path / "set/labels/b.PNG", ids(2, size=(5, 9)))
    (tmp_path / "set/images/.DS_Store").write_bytes(b"x")
    (tmp_path / "set/images/._b.png").write_bytes(b"x")
    (tmp_path / "set/labels/readme.txt").write_text("no image")
    source = create_source(
        "paired_folder", images=str(tmp_path / "set/images"), labels=str(tmp_path / "set/labels"), classes=THREE
    )
    assert len(source) == 2 and source.info.name == "set" and source.info.classes == THREE
    assert source.info.palette == default_palette(3)
    example = source.read(0)
    assert example["id"] == "a/Straße 1.JPG" and np.array_equal(example["image"], first)
    assert np.array_equal(example["labels"], ids(0, 1, 2, 255)) and example["labels"].dtype == np.uint8
    assert source.size(0) == (6, 8) and source.size(1) == (5, 9) == source.read(1)["labels"].shape
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(e["image"], first) for e in pool.map(source.read, [0] * 8))


def test_decomposed_and_composed_unicode_names_meet(tmp_path):
    image(tmp_path / "images/cafe\u0301.png")
    mask(tmp_path / "labels/caf\u00e9.png", ids(0, 1))
    source = create_source(
        "paired_folder", images=str(tmp_path / "images"), labels=str(tmp_path / "labels"), classes=THREE
    )
    assert source.read(0)["id"] == "caf\u00e9"


def test_suffix_rules(tmp_path):
    image(tmp_path / "all/x_rgb.png")
    mask(tmp_path / "all/x_ids.png", ids(0, 2))
    source = create_source(
        "paired_folder",
        images=str(tmp_path / "all"),
        labels=str(tmp_path / "all"),
        image_suffix="_rgb.png",
        label_suffix="_IDS.png",
        classes=THREE,
    )
    assert [source.read(i)["id"] for i in range(len(source))] == ["x"]


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ((0, 1, 2, 255), {}, (0, 1, 2, 255)),
        ((0, 1, 2, 11), {"ignore": 11}, (0, 1, 2, 255)),
        ((0, 7, 8, 9), {"ignore": (7, 8), "id_map": {0: 0, 9: 2}}, (0, 255, 255, 2)),
        ((0, 1, 2, 3, 255), {"reduce_zero_label": True}, (255, 0, 1, 2, 255)),
        ((7, 8, 9, 200), {"id_map": {7: 0, "8": 1, 9: 255}, "other": 2}, (0, 1, 255, 2)),
        ((7, 8, 255, 200), {"id_map": {7: 0, 8: 1}, "other": 255}, (0, 1, 255, 255)),
        ((0, 3, 255), {"threshold": 1, "classes": ("no", "yes")}, (0, 1, 1)),
        ((0, 127, 128, 255), {"threshold": 128, "classes": ("no", "yes")}, (0, 0, 1, 1)),
        ((0, 3, 255), {"threshold": 1, "classes": ("no", "yes"), "ignore": 255}, (0, 1, 255)),
    ],
)
def test_what_values_mean(tmp_path, values, options, expected):
    source = folder(tmp_path, [ids(*values)], **options)
    assert np.array_equal(source.read(0)["labels"], ids(*expected))


def test_options_from_a_config_and_its_json(tmp_path):
    config = ConfigDict({"id_map": {"7": 0, "8": 1, "9": 2}, "ignore": (0, 255), "classes": THREE})
    source = folder(tmp_path, [ids(7, 8, 9, 0)], **config.to_dict())
    assert np.array_equal(source.read(0)["labels"], ids(0, 1, 2, 255))


def test_sixteen_bit_masks(tmp_path):
    source = folder(tmp_path, [ids(1000, 40_000, 65_535, dtype=np.uint16)], id_map={1000: 0, 40_000: 2}, ignore=65_535)
    assert np.array_equal(source.read(0)["labels"], ids(0, 2, 255))


def test_palette_png_is_read_as_indices(tmp_path):
    image(tmp_path / "images/a.png")
    mask(tmp_path / "labels/a.png", ids(0, 1, 2, 255), palette=default_palette(256))
    source = create_source("paired_folder", images=f"{tmp_path}/images", labels=f"{tmp_path}/labels", classes=THREE)
    assert np.array_equal(source.read(0)["labels"], ids(0, 1, 2, 255))


def test_colored_masks(tmp_path):
    colors = np.array([(128, 64, 128), (0, 0, 0), (70, 70, 70), (255, 255, 255)], np.uint8)
    rgb = colors[ids(0, 1, 2, 3)]
    options = {"palette": [tuple(int(p) for p in c) for c in colors[:3]], "ignore": ((255, 255, 255),)}
    source = folder(tmp_path, [rgb], **options)
    assert np.array_equal(source.read(0)["labels"], ids(0, 1, 2, 255))
    assert source.info.palette == ((128, 64, 128), (0, 0, 0), (70, 70, 70))
    with pytest.raises(UserError, match=r"00\.png.*color \(255, 255, 255\).*palette="):
        folder(tmp_path, [rgb], palette=options["palette"])
    with pytest.raises(UserError, match=r"00\.png is a mask in color.*palette="):
        folder(tmp_path, [rgb])


def test_a_colored_mask_that_happens_to_be_gray_is_read_by_its_colors(tmp_path):
    gray = np.array([(0, 0, 0), (1, 1, 1)], np.uint8)[ids(0, 1)]
    source = folder(tmp_path, [gray], palette=((1, 1, 1), (0, 0, 0), (200, 0, 0)))
    assert np.array_equal(source.read(0)["labels"], ids(1, 0))


def test_links_back_up_do_not_multiply_files(tmp_path):
    folder(tmp_path, [ids(0, 1, 2)])
    (tmp_path / "images/again").symlink_to(tmp_path / "images")
    where = {"images": f"{tmp_path}/images", "labels": f"{tmp_path}/labels", "classes": THREE}
    assert len(create_source("paired_folder", **where)) == 1


def test_gray_saved_as_rgb_is_no_color(tmp_path):
    source = folder(tmp_path, [np.repeat(ids(0, 1, 2)[..., None], 3, 2)])
    assert np.array_equal(source.read(0)["labels"], ids(0, 1, 2))


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ((0, 255), {}, "threshold=1"),
        ((0, 255), {"classes": ("no", "yes")}, "threshold=1"),
        ((0, 128), {"classes": ("no", "yes")}, "0/128 mask.*threshold=1"),
        ((0, 1, 2, 3), {}, "reduce_zero_label=True.*ignore=3"),
        ((0, 1, 2, 200), {}, "id 200 .*id_map"),
        ((0, 26_001, 26_002), {}, "instance"),
        ((*[0] * 20, *[255] * 20, 30, 80, 100, 120, 140, 160, 180, 200), {"classes": ("no", "yes")}, "threshold=128"),
    ],
)
def test_wrong_values_stop_before_training_and_name_the_option(tmp_path, values, options, words):
    with pytest.raises(UserError, match=words):
        folder(tmp_path, [ids(*values, dtype=np.uint16 if max(values) > 255 else np.uint8)], **options)


def test_a_wrong_value_in_a_mask_that_was_not_probed_stops_at_reading(tmp_path):
    source = folder(tmp_path, [ids(0, 1, 2)] * 40)
    mask(tmp_path / "labels/03.png", ids(0, 1, 77))
    with pytest.raises(UserError, match=r"labels/03\.png: the id 77 \(3\d % of the pixels\)"):
        source.read(3)


def test_0_255_is_accepted_when_said(tmp_path):
    source = folder(tmp_path, [ids(0, 255)], ignore=255)
    assert np.array_equal(source.read(0)["labels"], ids(0, 255))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ignore": 2}, "ignore=2 is also the value of class 2 .'road'"),
        ({"id_map": {0: 0}, "reduce_zero_label": True}, "contradict"),
        ({"threshold": 1}, "two classes, but 3"),
        ({"other": 255}, "id_map"),
        ({"id_map": {0: 3}}, r"id_map\[0\]=3 is no label"),
        ({"id_map": {"x": 0}}, "no value of a mask"),
        ({"id_map": {-1: 0}}, "no value of a mask"),
        ({"palette": ((0, 0, 0),)}, "1 colors for 3 classes"),
        ({"palette": ((0, 0, 0), (0, 0, 300), (1, 1, 1))}, "triples"),
        ({"ignore": (1, 2, 3)}, "three ids or a color"),
        ({"classes": ()}, "names of 1 to"),
        ({"unpaired": "ignore"}, "unpaired"),
        ({"reduce_zero_labels": True}, "did you mean 'reduce_zero_label'"),
    ],
)
def test_contradictory_options_are_refused(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        folder(tmp_path, [ids(0, 1, 2)], **options)


def test_missing_partners_are_named_and_refused_unless_asked(tmp_path):
    folder(tmp_path, [ids(0, 1, 2)] * 3)
    (tmp_path / "labels/01.png").rename(tmp_path / "labels/01_x.png")
    where = {"images": f"{tmp_path}/images", "labels": f"{tmp_path}/labels", "classes": THREE}
    with pytest.raises(UserError, match=r"images/01\.png has no mask .*1 more"):
        create_source("paired_folder", **where)
    source = create_source("paired_folder", unpaired="skip", **where)
    assert [source.read(i)["id"] for i in range(len(source))] == ["00", "02"]


def test_names_that_differ_in_case_are_pointed_out(tmp_path):
    image(tmp_path / "images/IMG_1.JPG")
    mask(tmp_path / "labels/img_1.png", ids(0, 1))
    with pytest.raises(UserError, match="img_1.png differs in upper and lower case"):
        create_source("paired_folder", images=f"{tmp_path}/images", labels=f"{tmp_path}/labels", classes=THREE)


def test_two_files_of_one_name_are_refused(tmp_path):
    folder(tmp_path, [ids(0, 1, 2)])
    image(tmp_path / "images/00.jpg")
    with pytest.raises(UserError, match=r"00\.jpg and .*00\.png have the same name"):
        create_source("paired_folder", images=f"{tmp_path}/images", labels=f"{tmp_path}/labels", classes=THREE)


def test_missing_and_empty_folders(tmp_path):
    (tmp_path / "image").mkdir()
    with pytest.raises(UserError, match="There is no folder .*images; .* has image"):
        create_source("paired_folder", images=f"{tmp_path}/images", labels=f"{tmp_path}/image", classes=THREE)
    with pytest.raises(UserError, match="no image with a mask"):
        create_source("paired_folder", images=f"{tmp_path}/image", labels=f"{tmp_path}/image", classes=THREE)


def test_size_mismatch_is_refused_with_both_sizes(tmp_path):
    source = folder(tmp_path, [ids(0, 1, 2)] * 2)
    mask(tmp_path / "labels/01.png", ids(0, 1, size=(7, 8)))
    with pytest.raises(UserError, match=r"labels/01\.png is 7x8 .*images/01\.png is 6x8"):
        source.read(1)
    mask(tmp_path / "labels/01.png", ids(0, 1, size=(8, 6)))
    with pytest.raises(UserError, match="stored turned"):
        source.read(1)


def test_jpeg_masks_are_refused_unless_thresholded(tmp_path):
    two = np.zeros((16, 16), np.uint8)
    two[:, 8:] = 255
    with pytest.raises(UserError, match=r"00\.jpg is a mask in JPEG.*threshold=128"):
        folder(tmp_path, [two], suffix=".jpg", classes=("no", "yes"))
    source = folder(tmp_path, [two], suffix=".jpg", classes=("no", "yes"), threshold=128)
    assert np.array_equal(source.read(0)["labels"], two // 255)


def test_unreadable_files_do_not_stop_the_building_but_the_reading(tmp_path):
    source = folder(tmp_path, [ids(0, 1, 2)] * 2)
    (tmp_path / "labels/00.png").write_bytes(b"<html>not found</html>")
    source = create_source("paired_folder", images=f"{tmp_path}/images", labels=f"{tmp_path}/labels", classes=THREE)
    with pytest.raises(UserError, match=r"labels/00\.png.*web page"):
        source.read(0)
    assert source.read(1)["id"] == "01"


def test_files_that_change_or_vanish_under_the_reader(tmp_path):
    source = folder(tmp_path, [ids(0, 1, 2)] * 3)
    assert source.read(0)["id"] == "00"
    (tmp_path / "images/00.png").unlink()
    (tmp_path / "labels/01.png").write_bytes((tmp_path / "labels/01.png").read_bytes()[:40])
    mask(tmp_path / "labels/02.png", ids(0, 7))
    for i, cause in enumerate(
        (r"images/00\.png: .*no such file", r"labels/01\.png: .*(damaged|not an image)", r"02\.png: the id 7")
    ):
        with pytest.raises(UserError, match=cause):
            source.read(i)


def test_lists_pick_and_order(tmp_path):
    folder(tmp_path, [ids(0, 1, 2)] * 4)
    listed = tmp_path / "train.txt"
    listed.write_text("# chosen\n03\n\n01\r\n", encoding="utf-8-sig")
    where = {"images": f"{tmp_path}/images", "labels": f"{tmp_path}/labels", "classes": THREE}
    source = create_source("paired_folder", list_file=str(listed), **where)
    assert [source.read(i)["id"] for i in range(len(source))] == ["03", "01"]
    # Pairs: relative to the list, with a space in a name (tab between), and with folders of another machine.
    image(tmp_path / "images/with space.png")
    listed.write_text(
        "images/00.png labels/01.png\n"
        "images/with space.png\tlabels/02.png\n"
        "/home/someone/set/images/03.png,/home/someone/set/labels/00.png\n"
    )
    source = create_source("paired_folder", list_file=str(listed), **where)
    assert [(pair.image.name, pair.labels.name) for pair in source.pairs] == [
        ("00.png", "01.png"),
        ("with space.png", "02.png"),
        ("03.png", "00.png"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("00\n05\n", r"train\.txt, line 2: '05' is neither an image nor a mask"),
        ("00\n00\n", "line 2: '00' is also in line 1"),
        ("images/00.png labels/09.png\n", "line 1: the mask 'labels/09.png' is not there"),
        ("00 1 0 2\n", "line 1: '00 1 0 2' is neither one name nor two files"),
        ("# nothing\n", "is empty"),
    ],
)
def test_bad_lists_are_refused_with_the_line(tmp_path, text, words):
    folder(tmp_path, [ids(0, 1, 2)] * 2)
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(UserError, match=words):
        create_source(
            "paired_folder",
            images=f"{tmp_path}/images",
            labels=f"{tmp_path}/labels",
            classes=THREE,
            list_file=f"{tmp_path}/train.txt",
        )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_label_map_agrees_with_a_plain_loop(data):
    count = data.draw(st.integers(1, 6))
    id_map = data.draw(st.dictionaries(st.integers(0, 300), st.sampled_from([*range(count), 255]), min_size=1))
    other = data.draw(st.none() | st.sampled_from([0, 255]))
    values = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=40))
    expected = [id_map.get(v, other if other is not None else (255 if v == 255 else None)) for v in values]
    label_map = LabelMap([str(i) for i in range(count)], id_map=id_map, other=other)
    raw = np.array([values], np.uint16)
    if None in expected:
        with pytest.raises(UserError, match="some.png"):
            label_map(raw, "some.png")
    else:
        assert label_map(raw, "some.png").tolist() == [expected]


@pytest.mark.parametrize("count", [1, 2, 253, 254])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_no_count_of_classes_confuses_the_marks(count, dtype):
    label_map = LabelMap([str(i) for i in range(count)])
    good = np.array([[*range(count), 255]], dtype)
    assert np.array_equal(label_map(good, "m.png"), good)
    assert np.array_equal(label_map(good[:, :-1], "m.png"), good[:, :-1])
    for bad in {count, 254}:
        with pytest.raises(UserError, match=f"the id {bad} "):
            label_map(np.array([[0, bad]], dtype), "m.png")


def test_default_palette_is_vocs():
    assert default_palette(21) == VOC2012_PALETTE
    assert VOC2012_PALETTE[20] == (0, 64, 128) and VOC2012_PALETTE[15] == (192, 128, 128)
    assert len(set(default_palette(256))) == 256
