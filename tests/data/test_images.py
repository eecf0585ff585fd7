"""Image files of every kind that data sets hold, and every kind of file that only looks like one."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from jax_densevit.data.images import image_size, read_image, read_labels, stretch_contrast
from jax_densevit.errors import UserError

ORIENTATION = 0x0112


def png(path, width, height, depth, color, rows: bytes, before=(), after=()):
    """Writes a PNG by hand, of bit depths and chunk orders that Pillow does not write. `rows`: the scan lines."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    step = len(rows) // height
    data = b"".join(b"\0" + rows[i * step : (i + 1) * step] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*c) for c in before), chunk(b"IDAT", zlib.compress(data))]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join([*parts, *(chunk(*c) for c in after), chunk(b"IEND", b"")]))
    return path


def exif(orientation):
    data = Image.Exif()
    data[ORIENTATION] = orientation
    return data


@pytest.fixture
def photo():
    """uint8 [12, 17, 3], no symmetry."""
    return np.random.default_rng(0).integers(0, 256, (12, 17, 3)).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "ppm", "tga"])
def test_lossless_formats_come_back_as_they_are(tmp_path, photo, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(photo).save(path, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_image(path), photo)
    assert image_size(path) == (12, 17)
    assert read_image(path).flags.writeable


def test_the_content_decides_not_the_suffix(tmp_path, photo):
    path = tmp_path / "photo.jpg"
    Image.fromarray(photo).save(path, format="PNG")
    np.testing.assert_array_equal(read_image(path), photo)


def test_of_animations_and_pages_the_first_is_taken(tmp_path):
    frames = [Image.new("RGB", (5, 4), color) for color in ((200, 10, 20), (0, 0, 255))]
    for suffix in ("gif", "tiff", "png", "webp"):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(
            path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {})
        )
        assert (read_image(path) == (200, 10, 20)).all(), suffix


class TestColors:
    def test_gray(self, tmp_path):
        gray = np.arange(60, dtype=np.uint8).reshape(6, 10)
        Image.fromarray(gray).save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.repeat(gray[..., None], 3, 2))

    def test_one_bit(self, tmp_path):
        bits = np.random.default_rng(0).random((6, 10)) < 0.5
        Image.fromarray(bits).save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_image(tmp_path / "a.png")[..., 0], 255 * bits)

    def test_transparency_shows_white(self, tmp_path):
        rgba = np.zeros((1, 3, 4), np.uint8)
        rgba[0] = [(10, 20, 30, 255), (10, 20, 30, 0), (0, 100, 255, 51)]
        Image.fromarray(rgba).save(tmp_path / "a.png")
        np.testing.assert_array_equal(
            read_image(tmp_path / "a.png")[0], [(10, 20, 30), (255, 255, 255), (204, 224, 255)]
        )

    def test_gray_with_alpha(self, tmp_path):
        png(tmp_path / "a.png", 2, 1, 8, 4, bytes([7, 255, 7, 0]))
        np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0, :, 0], [7, 255])

    def test_palette_with_and_without_transparency(self, tmp_path):
        image = Image.new("P", (2, 1))
        image.putpalette([1, 2, 3, 40, 50, 60])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "opaque.png")
        image.save(tmp_path / "clear.png", transparency=1)
        np.testing.assert_array_equal(read_image(tmp_path / "opaque.png")[0], [(1, 2, 3), (40, 50, 60)])
        np.testing.assert_array_equal(read_image(tmp_path / "clear.png")[0], [(1, 2, 3), (255, 255, 255)])

    def test_color_key_transparency(self, tmp_path):
        key = struct.pack(">HHH", 9, 9, 9)
        png(tmp_path / "a.png", 2, 1, 8, 2, bytes([9, 9, 9, 9, 9, 8]), before=[(b"tRNS", key)])
        np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0], [(255, 255, 255), (9, 9, 8)])

    def test_sixteen_bit_gray_is_scaled_not_saturated(self, tmp_path):
        ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        for suffix in ("png", "tiff"):
            path = tmp_path / f"a.{suffix}"
            Image.fromarray(ramp).save(path)
            image = read_image(path)
            np.testing.assert_array_equal(image[..., 0], np.rint(ramp / 257))
            assert image.mean() == 127.5

    def test_sixteen_bit_pgm(self, tmp_path):
        values = np.array([[0, 257, 32896, 65535]], ">u2")
        (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + values.tobytes())
        np.testing.assert_array_equal(read_image(tmp_path / "a.pgm")[0, :, 1], [0, 1, 128, 255])

    def test_sixteen_bit_color_keeps_its_brightness(self, tmp_path):
        values = np.random.default_rng(0).integers(0, 65536, (8, 8, 3)).astype(">u2")
        png(tmp_path / "a.png", 8, 8, 16, 2, values.tobytes())
        difference = read_image(tmp_path / "a.png") - values / 257
        assert np.abs(difference).max() <= 1

    def test_cmyk_jpeg_is_not_inverted(self, tmp_path):
        color = (200, 30, 60)
        Image.new("RGB", (16, 16), color).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
        assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - color).max() <= 4

    @pytest.mark.parametrize(("mode", "cause"), [("F", "floating point"), ("I", "32-bit integers")])
    def test_values_without_a_white_are_refused(self, tmp_path, mode, cause):
        Image.new(mode, (4, 4)).save(tmp_path / "a.tiff")
        with pytest.raises(UserError, match=f"a.tiff: pixels are {cause}.*convert"):
            read_image(tmp_path / "a.tiff")

    def test_profiles_and_gamma_change_nothing(self, tmp_path, photo):
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        gamma = PngInfo()
        gamma.add(b"gAMA", struct.pack(">I", 100_000))
        Image.fromarray(photo).save(tmp_path / "a.png", icc_profile=profile, pnginfo=gamma)
        with Image.open(tmp_path / "a.png") as image:
            assert image.info["icc_profile"] == profile and image.info["gamma"] == 1
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), photo)


class TestOrientation:
    # What undoes EXIF orientation 1..8 (the TIFF standard's table of rows and columns), in NumPy.
    UNDO = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
        8: lambda x: np.rot90(x, 1),
    }

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
    def test_upright(self, tmp_path, photo, orientation, suffix):
        path = tmp_path / f"a.{suffix}"
        options = {"lossless": True} if suffix == "webp" else {}
        Image.fromarray(photo).save(path, exif=exif(orientation), **options)
        expected = self.UNDO[orientation](photo)
        np.testing.assert_array_equal(read_image(path), expected)
        np.testing.assert_array_equal(read_labels(path), expected)
        assert image_size(path) == expected.shape[:2]

    def test_jpeg(self, tmp_path, photo):
        for orientation in range(1, 9):
            Image.fromarray(photo).save(tmp_path / "a.jpg", exif=exif(orientation), quality=95)
            Image.fromarray(photo).save(tmp_path / "b.jpg", quality=95)
            np.testing.assert_array_equal(
                read_image(tmp_path / "a.jpg"), self.UNDO[orientation](read_image(tmp_path / "b.jpg"))
            )
            assert image_size(tmp_path / "a.jpg") == read_image(tmp_path / "a.jpg").shape[:2]

    def test_an_orientation_after_the_pixels_counts_too(self, tmp_path):
        data = exif(6).tobytes().removeprefix(b"Exif\0\0")
        path = png(tmp_path / "late.png", 3, 1, 8, 0, bytes([1, 2, 3]), after=[(b"eXIf", data)])
        assert read_image(path).shape == (3, 1, 3)
        assert image_size(path) == (3, 1)

    def test_damaged_exif_counts_as_none(self, tmp_path):
        path = png(tmp_path / "a.png", 3, 1, 8, 0, bytes([1, 2, 3]), before=[(b"eXIf", b"II*\0garbage!")])
        assert read_image(path).shape == (1, 3, 3) and image_size(path) == (1, 3)


class TestLabels:
    @pytest.mark.parametrize("depth", [1, 2, 4, 8])
    def test_palette_indices(self, tmp_path, depth):
        ids = np.random.default_rng(0).integers(0, 2**depth, (6, 8)).astype(np.uint8)
        image = Image.fromarray(ids).convert("L")
        image.putpalette([(7 * i) % 256 for i in range(3 * 2**depth)])
        assert image.mode == "P"
        image.save(tmp_path / "a.png", bits=depth)
        np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), ids)

    @pytest.mark.parametrize("depth", [1, 2, 4, 8])
    def test_gray_of_few_bits_is_ids_not_shades(self, tmp_path, depth):
        ids = np.random.default_rng(0).integers(0, 2**depth, (6, 8)).astype(np.uint8)
        bits = (ids[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        png(tmp_path / "a.png", 8, 6, depth, 0, np.packbits(bits.reshape(6, -1), axis=1).tobytes())
        labels = read_labels(tmp_path / "a.png")
        np.testing.assert_array_equal(labels, ids)
        assert labels.dtype == np.uint8

    def test_sixteen_bits(self, tmp_path):
        ids = np.array([[0, 1, 255, 256, 65535]], np.uint16)
        Image.fromarray(ids).save(tmp_path / "a.png")
        labels = read_labels(tmp_path / "a.png")
        np.testing.assert_array_equal(labels, ids)
        assert labels.dtype == np.uint16

    def test_a_transparent_palette_entry_stays_an_index(self, tmp_path):
        image = Image.new("P", (2, 1), 1)
        image.putpalette([0, 0, 0, 128, 0, 0])
        image.save(tmp_path / "a.png", transparency=1)
        np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), [[1, 1]])

    def test_rgb_masks_keep_their_colors(self, tmp_path, photo):
        Image.fromarray(photo).save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), photo)
        Image.fromarray(np.dstack([photo, np.full((12, 17), 255, np.uint8)])).save(tmp_path / "b.png")
        np.testing.assert_array_equal(read_labels(tmp_path / "b.png"), photo)

    def test_pgm_of_other_than_eight_bits_is_refused(self, tmp_path):
        """Pillow stretches its values to 0..255: ids would be wrong silently."""
        (tmp_path / "a.pgm").write_bytes(b"P5 3 1 20\n" + bytes([0, 7, 20]))
        with pytest.raises(UserError, match="a.pgm.*maximum 20.*PNG"):
            read_labels(tmp_path / "a.pgm")
        (tmp_path / "b.pgm").write_bytes(b"P5 3 1 255\n" + bytes([0, 7, 20]))
        np.testing.assert_array_equal(read_labels(tmp_path / "b.pgm"), [[0, 7, 20]])

    @pytest.mark.parametrize("mode", ["F", "CMYK"])
    def test_what_has_no_ids_is_refused(self, tmp_path, mode):
        Image.new(mode, (4, 4)).save(tmp_path / "a.tiff")
        with pytest.raises(UserError, match="a.tiff: .*no label ids"):
            read_labels(tmp_path / "a.tiff")

    def test_transparent_and_oversized_ids_are_refused(self, tmp_path):
        Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "a.png")
        with pytest.raises(UserError, match="a.png: .*transparent"):
            read_labels(tmp_path / "a.png")
        Image.fromarray(np.array([[-1, 70000]], np.int32)).save(tmp_path / "a.tiff")
        with pytest.raises(UserError, match="a.tiff: label values from -1 to 70000"):
            read_labels(tmp_path / "a.tiff")


class TestBadFiles:
    """Each is one sentence with the file and its cause, from every function."""

    READERS = pytest.mark.parametrize("read", [read_image, read_labels, image_size])

    @READERS
    def test_missing_folder_and_link(self, tmp_path, read):
        (tmp_path / "x.jpg").mkdir()
        (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
        for name, cause in (("none.png", "no such file"), ("x.jpg", "a folder"), ("link.png", "a link to .*gone.png")):
            with pytest.raises(UserError, match=f"{name}: .*{cause}"):
                read(tmp_path / name)

    @READERS
    @pytest.mark.parametrize(
        ("content", "cause"),
        [
            (b"", "empty"),
            (b"\n<!DOCTYPE html><html>404</html>", "web page"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            (b"no image at all", "not an image"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # would run Ghostscript
            (b"\x89PNG\r\n\x1a\n", "not an image|damaged"),
        ],
    )
    def test_content(self, tmp_path, read, content, cause):
        path = tmp_path / "bad.jpg"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"bad.jpg: .*({cause})"):
            read(path)

    @pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
    def test_truncated(self, tmp_path, photo, suffix):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(np.tile(photo, (8, 8, 1))).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
        with pytest.raises(UserError, match=f"cut.{suffix}: .*(truncated or damaged|not an image)"):
            read_image(path)

    @READERS
    def test_a_bomb_is_refused_before_memory_is_taken(self, tmp_path, read):
        for side in (10_000, 30_000):  # Pillow itself only warns of the first
            path = png(tmp_path / "bomb.png", side, side, 8, 2, bytes(side))
            with pytest.raises(UserError, match="bomb.png: .*more than 89478485 pixels.*MAX_IMAGE_PIXELS"):
                read(path)

    def test_odd_shapes_are_fine(self, tmp_path):
        for height, width in ((1, 1), (1, 5000), (5000, 1)):
            Image.new("RGB", (width, height)).save(tmp_path / "a.png")
            assert read_image(tmp_path / "a.png").shape == (height, width, 3)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA"]),
        damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
        keep=st.floats(0, 1),
    )
    def test_any_damage_gives_an_image_or_one_sentence(self, tmp_path, photo, kind, damage, keep):
        path = tmp_path / "fuzz"
        Image.fromarray(photo).save(
            path, format=kind, **({} if kind == "PPM" else {"exif": exif(6)} if kind != "BMP" else {})
        )
        content = bytearray(path.read_bytes())
        for place, value in damage:
            content[int(place * (len(content) - 1))] = value
        path.write_bytes(bytes(content[: int(keep * len(content)) if keep < 0.9 else None]))
        for read in (read_image, read_labels, image_size):
            try:
                read(path)
            except UserError as error:
                assert "fuzz: " in str(error) and "\n" not in str(error)


class TestStretch:
    def test_percentiles_become_black_and_white_in_every_channel(self):
        ramp = np.arange(101, dtype=np.uint8)
        image = np.stack([ramp, ramp // 2 + 7, 250 - 2 * ramp], -1)[None]
        result = stretch_contrast(image, (10, 90))
        assert result.dtype == np.uint8 and result.shape == image.shape
        for channel in range(3):  # of a ramp 0..100, the percentiles are 10 and 90
            values = image[0, :, channel].astype(float)
            low, high = np.percentile(values, (10, 90))
            expected = np.clip(255 * (values - low) / (high - low), 0, 255)
            assert np.abs(result[0, :, channel] - expected).max() <= 0.5 + 1e-9
        assert (result[0, :11, 0] == 0).all() and (result[0, 90:, 0] == 255).all() and result[0, 50, 0] == 128

    def test_exposure_does_not_matter(self, photo):
        dark = (photo // 8).astype(np.uint8)  # values 0..31
        np.testing.assert_array_equal(stretch_contrast(dark, (0, 100)), stretch_contrast(3 * dark + 20, (0, 100)))

    def test_a_few_bright_specks_do_not_set_the_scale(self):
        image = np.tile(np.arange(40, 60, dtype=np.uint8)[:, None, None], (1, 200, 3))
        specks = image.copy()
        specks[3, :2] = 255
        inside, outside = stretch_contrast(image, (1, 99))[5:15], stretch_contrast(specks, (1, 99))[5:15]
        np.testing.assert_array_equal(inside, outside)

    def test_one_value_stays_and_nothing_asked_changes_nothing(self, photo):
        flat = np.full((4, 5, 3), 17, np.uint8)
        np.testing.assert_array_equal(stretch_contrast(flat, (1, 99)), flat)
        assert stretch_contrast(photo, ()) is photo


@pytest.mark.reference
def test_real_photos(reference_data):
    """Every file of the real sets can be read, and its header tells the size of what is read."""
    files = [p for p in sorted(reference_data.glob("data/*/**/*")) if p.suffix in (".png", ".jpg")][::3]
    assert len(files) > 300
    for path in files:
        assert read_image(path).shape[:2] == image_size(path) == read_labels(path).shape[:2], path
