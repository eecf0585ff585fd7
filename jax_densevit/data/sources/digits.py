"""Handwritten digits as glyphs: scikit-learn's bundled set, or MNIST from idx files. Split by digit, never by scene."""

import functools
import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from jax_densevit.errors import UserError

# Glyphs are kept at this size (longer side of the ink), above any size they are drawn at in the default scenes, so that
# drawing only ever shrinks them.
GLYPH = 48
SPLITS = ("train", "val", "test")

# The same for every seed: which digits are held out is a fact about the data, not about a run.
_SPLIT_SEED = 20260


class Glyphs:
    """Digit pictures of one split: `images[i]` is a Pillow "L" image (255 = ink, cut tight), `digits[i]` its 0..9."""

    def __init__(self, images: list[Image.Image], digits: np.ndarray):
        self.images = images
        self.digits = digits
        self.by_digit = [np.flatnonzero(digits == digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.images)


def _tight(image: np.ndarray, sharpen: tuple[float, float]) -> Image.Image:
    """Enlarges a small digit smoothly, makes its strokes crisp and cuts it tight; longer side GLYPH.

    `sharpen` are the ink levels in 0..1 that become nothing and full ink; half coverage, where a label begins, lies
    between the two.
    """
    height, width = image.shape
    scale = 2 * GLYPH // max(height, width)
    # A border of paper, so that smooth enlarging does not run into the edge of the picture.
    padded = np.pad(image, 2)
    large = Image.fromarray(padded).resize((padded.shape[1] * scale, padded.shape[0] * scale), Image.Resampling.BICUBIC)
    low, high = sharpen
    ink = np.clip((np.asarray(large, np.float32) / 255 - low) / (high - low), 0, 1)
    crisp = Image.fromarray(np.round(ink * 255).astype(np.uint8))
    crisp = crisp.crop(Image.fromarray((ink >= 0.5).astype(np.uint8)).getbbox())
    longest = max(crisp.size)
    size = (max(1, round(crisp.width * GLYPH / longest)), max(1, round(crisp.height * GLYPH / longest)))
    return crisp.resize(size, Image.Resampling.BICUBIC)


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """Reads an idx file (http://yann.lecun.com/exdb/mnist), plain or .gz: uint8, `dims` dimensions."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic = struct.unpack_from(">I", data)[0]
        shape = struct.unpack_from(f">{dims}I", data, 4)
    except (OSError, EOFError, struct.error, gzip.zlib.error) as error:
        raise UserError(f"{path} cannot be read as an idx file ({error}); download it again.") from error
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dims)
    if magic != 0x800 + dims or values.size != int(np.prod(shape)):
        raise UserError(f"{path} is not a complete idx file of {dims}-d bytes (magic {magic}); download it again.")
    return values.reshape(shape)


def _mnist_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The (images [n, 28, 28], digits [n]) of "train" or "t10k", or None when the folder has no such files."""
    found = []
    for kind, dims in (("images", 3), ("labels", 1)):
        # Both spellings are about: train-images-idx3-ubyte and train-images.idx3-ubyte.
        names = [f"{part}-{kind}{dot}idx{dims}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
        paths = [folder / name for name in names if (folder / name).is_file()]
        if not paths:
            if kind == "labels":
                raise UserError(f"{folder} has {part}'s images but not its labels; add {names[1]}.")
            return None
        found.append(_read_idx(paths[0], dims))
    if len(found[0]) != len(found[1]) or found[1].max(initial=0) > 9:
        raise UserError(f"{folder}: the images and labels of {part} do not belong together; download both again.")
    return found[0], found[1]


def _shares(digits: np.ndarray) -> dict[str, np.ndarray]:
    """Splits digits into 80 % train, 10 % val, 10 % test of every class, by a fixed shuffle."""
    parts = {split: [] for split in SPLITS}
    rng = np.random.default_rng(_SPLIT_SEED)
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(digits == digit))
        tenth = len(members) // 10
        for split, chosen in zip(
            SPLITS, (members[2 * tenth :], members[:tenth], members[tenth : 2 * tenth]), strict=True
        ):
            parts[split].append(chosen)
    return {split: np.sort(np.concatenate(chosen)) for split, chosen in parts.items()}


@functools.lru_cache(maxsize=8)
def load_glyphs(split: str, mnist: str = "") -> Glyphs:
    """The digits that scenes of `split` are drawn from.

    Args:
      split: "train", "val" or "test"; no handwritten digit is in two of them.
      mnist: a folder with MNIST's idx files (plain or .gz). Its 60,000 training digits are split into train and val,
        and its 10,000 test digits are test; with only the t10k files these are split in three. Empty: the 1,797 digits
        of 8x8 pixels that come with scikit-learn (E. Alpaydin, C. Kaynak, UCI, 1998), 80 % train, 10 % val, 10 % test.

    Raises:
      UserError: the folder has no MNIST, or broken files.
    """
    if mnist:
        folder = Path(mnist)
        train, test = _mnist_part(folder, "train"), _mnist_part(folder, "t10k")
        if train is None and test is None:
            raise UserError(
                f"{folder} has no MNIST files; expected train-images-idx3-ubyte(.gz) or t10k-images-idx3-ubyte(.gz)."
            )
        if train is not None and test is not None:
            if split == "test":
                images, digits = test
            else:
                images, digits = train
                shares = _shares(digits)
                kept = shares["val"] if split == "val" else np.sort(np.concatenate([shares["train"], shares["test"]]))
                images, digits = images[kept], digits[kept]
        else:
            images, digits = train or test
            kept = _shares(digits)[split]
            images, digits = images[kept], digits[kept]
        sharpen = (0.2, 0.8)
    else:
        from sklearn.datasets import load_digits  # slow to import: only when scenes are drawn

        bundled = load_digits()
        kept = _shares(bundled.target)[split]
        images, digits = np.round(bundled.images[kept] * (255 / 16)).astype(np.uint8), bundled.target[kept]
        # Each of these pixels is the share of ink in a 4x4 block, so strokes are soft: sharpen more.
        sharpen = (0.3, 0.7)
    inked = np.flatnonzero(images.reshape(len(images), -1).max(1) > 127)  # an empty picture has no tight box
    return Glyphs([_tight(images[i], sharpen) for i in inked], np.asarray(digits[inked], np.int32))
