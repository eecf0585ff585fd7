"""Image files to arrays, always through Pillow and always by content, never by the file's suffix.

What comes out, whatever went in:

* images are uint8 RGB, upright: the EXIF orientation is applied;
* transparency (alpha channels, palette or colour-key transparency) is composited on white;
* 16-bit gray is scaled by 1/257 and rounded (65535 becomes 255); Pillow itself reduces 16-bit colour to its high bytes;
* CMYK and YCCK become RGB without colour management; ICC profiles and gamma are ignored;
* of animations and multi-page files the first frame is taken;
* floating point and 32-bit files are refused, since nothing says which value is white;
* files of more pixels than `PIL.Image.MAX_IMAGE_PIXELS` are refused before memory is allocated.

Every function raises :class:`UserError` that names the file and the cause when it cannot.
"""

import contextlib
import dataclasses
import functools
import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from jax_densevit.errors import UserError

# None that runs another program (EPS). JPEG includes MPO, the several pictures in one file of some cameras.
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "TGA", "JPEG2000", "AVIF")
BACKGROUND = (255, 255, 255)  # transparent pixels show it
_ORIENTATION = 0x0112


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """The bytes of an image file out of a container (a TFRecord), and a name for messages; goes where a path goes."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


ImageFile = str | os.PathLike | EncodedImage


def read_image(path: ImageFile) -> np.ndarray:
    """Reads an image file: uint8 [H, W, 3], RGB, upright. The rules are in the module's docstring."""
    with _opened(path) as image:
        image.load()
        return _to_rgb(_upright(image), path)


def stretch_contrast(image: np.ndarray, percentiles: tuple[float, ...]) -> np.ndarray:
    """Spreads every channel so that its own low and high percentile become 0 and 255; what lies beyond is clipped.

    Pictures of a microscope differ in exposure and stain, and a few bright specks may set the scale of a whole picture:
    percentiles of each channel bring dark pictures up and make the empty background alike, whatever its tint.

    Args:
      image: uint8 [H, W, 3].
      percentiles: (low, high) in [0, 100], e.g. (0.1, 99.9); empty leaves the image as it is.

    Returns:
      uint8 [H, W, 3], rounded; a channel whose two percentiles are the same value is left as it is.
    """
    if not percentiles:
        return image
    values = np.arange(256)
    tables = []
    for channel in range(image.shape[-1]):
        low, high = np.percentile(image[..., channel], percentiles)
        stretched = np.clip((values - low) * (255 / (high - low)) + 0.5, 0, 255) if high > low else values
        tables.append(stretched.astype(np.uint8))
    return np.stack([table[image[..., channel]] for channel, table in enumerate(tables)], axis=-1)


def read_labels(path: ImageFile) -> np.ndarray:
    """Reads a label map without interpreting it: ids, never colours turned gray.

    Returns:
      uint8 [H, W]: palette indices, 8-bit (or 1, 2, 4-bit) gray values; uint16 [H, W]: 16-bit gray values; or
      uint8 [H, W, 3] for an RGB mask, which only a caller with a palette can turn into ids.
    """
    with _opened(path) as image:
        scale = _gray_scale(image, path)
        image.load()
        image = _upright(image)
        if image.mode in ("LA", "RGBA", "PA"):
            if image.getchannel("A").getextrema()[0] < 255:
                raise UserError(f"{path}: a label map must not be transparent; save it without an alpha channel.")
            image = image.convert("RGB") if image.mode == "RGBA" else image.getchannel(0)
        if image.mode == "1":
            return np.array(image, np.uint8)
        if image.mode in ("L", "P", "RGB"):
            labels = np.array(image)
            return labels // scale if scale > 1 else labels
        if image.mode.startswith("I"):
            labels = np.asarray(image)
            if labels.min() < 0 or labels.max() > 65535:
                raise UserError(
                    f"{path}: label values from {labels.min()} to {labels.max()} do not fit 16 bits; "
                    "write ids between 0 and 65535."
                )
            return labels.astype(np.uint16)
        raise UserError(
            f"{path}: pixels of Pillow's mode {image.mode!r} are no label ids; save 8 or 16-bit gray, or palette PNG."
        )


def image_size(path: ImageFile) -> tuple[int, int]:
    """(height, width) of an image file as it is displayed (after EXIF orientation), without decoding the pixels."""
    with _opened(path) as image:
        if image.format == "PNG" and _has_late_metadata(path):
            image.load()
        width, height = image.size
        # Pillow's TIFF reader reports the displayed size by itself.
        turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
        return (width, height) if turned else (height, width)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def _opened(path: ImageFile) -> Iterator[Image.Image]:
    """An image file with its header read; every failure of the file system or of Pillow inside becomes a UserError."""
    try:
        with _stream(path) as file, Image.open(file, formats=_formats()) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError
            yield image
    except (UserError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(
            f"{path}: the image has more than {Image.MAX_IMAGE_PIXELS} pixels, the limit; "
            "cut it into tiles, or raise PIL.Image.MAX_IMAGE_PIXELS in the config file if you trust it."
        ) from error
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise UserError(f"{path}: {_cause(path, error)}") from error


def _stream(path: ImageFile) -> BinaryIO:
    return io.BytesIO(path.data) if isinstance(path, EncodedImage) else open(path, "rb")


def _cause(path: ImageFile, error: Exception) -> str:
    """What is wrong with a file that could not be read, and the way out."""
    if not isinstance(path, EncodedImage):
        path = Path(path)
        problem = _cause_of_path(path, error)
        if problem:
            return problem
    with _stream(path) as file:
        start = file.read(512)
    if not start:
        return "this file is empty; fetch it again."
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml", b"<head", b"<body")):
        return "this is a web page, not an image; the download failed: fetch it again."
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not an image; run `git lfs pull`."
    if isinstance(error, Image.UnidentifiedImageError):
        return f"this is not an image that Pillow knows as one of {', '.join(FORMATS)}."
    return f"the image is truncated or damaged ({str(error) or type(error).__name__}); replace or remove it."


def _cause_of_path(path: Path, error: Exception) -> str:
    """What is wrong with a path at which there is no readable file, or ""."""
    if path.is_dir():
        return "this is a folder, not an image file; give the files inside it."
    if isinstance(error, PermissionError):
        return "no permission to read this file."
    if not path.exists():
        if path.is_symlink():
            return f"this is a link to {os.readlink(path)}, which does not exist."
        return "there is no such file."
    return ""


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation 1..8; damaged EXIF data counts as none."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as for the pixels, only that the image is good without
        return 1


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if _orientation(image) in range(2, 9) else image


def _to_rgb(image: Image.Image, path) -> np.ndarray:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        gray = np.asarray(image).astype(np.uint32)
        gray = ((gray + 128) // 257).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise UserError(
            f"{path}: pixels are {'32-bit integers' if image.mode == 'I' else 'floating point'}, "
            "and nothing says which value is white; convert the file to 8 or 16 bits."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _gray_scale(image: Image.Image, path) -> int:
    """What Pillow multiplies 2 and 4-bit gray values by while it decodes (must be asked before `load`)."""
    arguments = image.tile[0].args if image.tile else ""
    if image.format == "PPM" and not isinstance(arguments, str) and arguments[1] not in (255, 65535):
        raise UserError(
            f"{path}: label maps in PGM with maximum {arguments[1]} would be stretched; save 8 or 16-bit gray PNG."
        )
    raw_mode = arguments if isinstance(arguments, str) else (arguments or ("",))[0]
    return {"L;2": 85, "L;4": 17}.get(raw_mode, 1)


def _has_late_metadata(path: ImageFile) -> bool:
    """Whether a PNG file has chunks after its pixels: an orientation there is seen only after decoding."""
    with _stream(path) as file:
        file.seek(8)
        pixels_seen = False
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"IEND":
                return False
            if kind == b"IDAT":
                pixels_seen = True
            elif pixels_seen:
                return True
            file.seek(length + 4, os.SEEK_CUR)
    return False
