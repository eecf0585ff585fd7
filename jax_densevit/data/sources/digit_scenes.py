"""Scenes of scattered handwritten digits, drawn on the fly: every example a pure function of (seed, split, index)."""

import numpy as np
from PIL import Image

from jax_densevit.data.source import DataInfo, Example
from jax_densevit.data.sources.digits import SPLITS, load_glyphs
from jax_densevit.data.sources.registry import register_source
from jax_densevit.errors import UserError, did_you_mean

CLASSES = ("background", *"0123456789")
PALETTE = (
    (32, 32, 36),
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (67, 99, 216),
    (245, 130, 49),
    (145, 30, 180),
    (66, 212, 244),
    (240, 50, 230),
    (191, 239, 69),
    (250, 190, 212),
)
INFO = DataInfo("digit_scenes", CLASSES, PALETTE, mean=(0.5,) * 3, std=(0.5,) * 3, things=CLASSES[1:])
STYLES = ("color", "plain", "wild")
LENGTHS = {"train": 60_000, "val": 1_000, "test": 1_000}

_TRIES = 30  # places tried for one digit before the whole scene is laid out anew


@register_source("digit_scenes", lambda: INFO)
class DigitScenes:
    """Scattered handwritten digits with semantic labels (0 background, 1..10 the digits 0..9) and instances (1..n).

    The scattered-MNIST set of instance segmentation: 64x64 scenes of 1 to 4 digits, *easy* where they never overlap,
    *hard* where they may. A pixel is labelled with a digit where at least half of it is ink.

    Args:
      split: "train", "val" or "test": scenes of different splits share no handwritten digit.
      length: number of scenes; 0 takes 60,000 for train (the report's epoch) and 1,000 for val and test.
      size: (height, width) of a scene.
      digits: (fewest, most) digits in a scene.
      scale: (smallest, largest) longer side of a digit in pixels, after rotation. Where "none" overlap leaves no room
        after four attempts at a scene, its digits are drawn a little smaller.
      rotation: largest turn to either side, in degrees.
      overlap: "none" leaves at least one pixel between the ink of any two digits (easy); "allowed" scatters freely,
        later digits on top, labels and instances showing what is visible (hard).
      amodal: also give the whole of every digit, what later ones hide of it too ("amodal" of `data.source`).
      style: "color", bright digits on a dim, uneven, slightly noisy ground; "plain", white on black as in the report;
        "wild", any two colors of enough contrast and strong noise.
      mnist: a folder with MNIST's idx files; empty takes scikit-learn's bundled digits.
      seed: draws other scenes from the same digits.
    """

    def __init__(
        self,
        split: str = "train",
        length: int = 0,
        size: tuple[int, int] = (64, 64),
        digits: tuple[int, int] = (1, 4),
        scale: tuple[int, int] = (16, 28),
        rotation: float = 15.0,
        overlap: str = "none",
        amodal: bool = False,
        style: str = "color",
        mnist: str = "",
        seed: int = 0,
    ):
        for what, value, known in (
            ("split", split, SPLITS),
            ("overlap", overlap, ("none", "allowed")),
            ("style", style, STYLES),
        ):
            if value not in known:
                raise UserError(f"digit_scenes: {what} {value!r} is unknown{did_you_mean(value, known)}")
        if not 0 <= digits[0] <= digits[1] <= 65_535 or digits[1] == 0:
            raise UserError(
                f"digit_scenes: digits={tuple(digits)} must be (fewest, most) with 0 <= fewest <= most and most > 0."
            )
        if amodal and digits[1] > 16:
            raise UserError(f"digit_scenes: amodal=True has room for 16 digits, not for {digits[1]}.")
        if not 4 <= scale[0] <= scale[1] <= min(size):
            raise UserError(
                f"digit_scenes: scale={tuple(scale)} must be (smallest, largest) with 4 <= smallest <= largest <= "
                f"the shorter side of size={tuple(size)}."
            )
        # The second bound makes sure that shrinking crowded digits down to 4 pixels ends, however unlucky the draws.
        area = size[0] * size[1]
        if overlap == "none" and (digits[1] * scale[0] ** 2 > 0.6 * area or digits[1] * 5**2 > 0.3 * area):
            raise UserError(
                f"digit_scenes: {digits[1]} digits of {scale[0]} pixels do not fit side by side into {tuple(size)}; "
                "lower digits or scale, raise size, or set overlap='allowed'."
            )
        self.info = INFO
        self.split, self.seed, self.style, self.overlap, self.amodal = split, int(seed), style, overlap, amodal
        self.scene_size = (int(size[0]), int(size[1]))
        self.digits, self.scale, self.rotation = tuple(digits), tuple(scale), float(rotation)
        self.length = int(length) or LENGTHS[split]
        self.glyphs = load_glyphs(split, mnist)
        ys, xs = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32)
        self._grid = (ys / size[0] - 0.5, xs / size[1] - 0.5)

    def __len__(self) -> int:
        return self.length

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of every scene."""
        return self.scene_size

    def read(self, index: int) -> Example:
        """Draws scene `index`: image uint8 [H, W, 3], labels uint8 [H, W], instances uint16 [H, W], id; amodal."""
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        height, width = self.scene_size
        ground, inks = self._colors(rng)
        labels = np.zeros((height, width), np.uint8)
        instances, amodal = np.zeros((2, height, width), np.uint16)
        for number, (digit, y, x, alpha, ink) in enumerate(self._place(rng), start=1):
            window = (slice(y, y + alpha.shape[0]), slice(x, x + alpha.shape[1]))
            ground[window] += (alpha.astype(np.float32) / 255)[..., None] * (inks[number - 1] - ground[window])
            labels[window][ink] = digit + 1
            instances[window][ink] = number
            if self.amodal:
                amodal[window][ink] |= np.uint16(1 << (number - 1))
        if self.style != "plain":
            strength = 6.0 if self.style == "color" else 20.0
            ground += strength * rng.standard_normal((height, width, 1), np.float32)
        image = np.clip(ground, 0, 255).astype(np.uint8)
        maps = {"labels": labels, "instances": instances} | ({"amodal": amodal} if self.amodal else {})
        return {"image": image, **maps, "id": f"{self.split}-{self.seed}-{index:06d}"}

    def _colors(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The ground float32 [H, W, 3] (0..255) and one ink color [most, 3] per digit."""
        count = self.digits[1]
        if self.style == "plain":
            return np.zeros((*self.scene_size, 3), np.float32), np.full((count, 3), 255, np.float32)
        if self.style == "color":
            base = rng.uniform(10, 90, 3)
            slope = rng.uniform(-30, 30, 3)
            inks = rng.uniform(110, 255, (count, 3))
            inks[np.arange(count), rng.integers(0, 3, count)] = 255
        else:
            base = rng.uniform(0, 255, 3)
            slope = rng.uniform(-60, 60, 3)
            inks = rng.uniform(0, 255, (count, 3))
            # At least 90 levels of luminance between ink and ground: flip the ink to whichever side has room.
            luminance = np.array([0.299, 0.587, 0.114])
            low = np.abs((inks - base) @ luminance) < 90
            away = base + (120 if base @ luminance < 128 else -120)
            inks[low] = np.clip(away + rng.uniform(-25, 25, (count, 3)), 0, 255)[low]
        angle = rng.uniform(0, 2 * np.pi)
        ramp = np.float32(np.sin(angle)) * self._grid[0] + np.float32(np.cos(angle)) * self._grid[1]
        return base.astype(np.float32) + ramp[..., None] * slope.astype(np.float32), inks.astype(np.float32)

    def _draw(self, rng: np.random.Generator, shrink: float) -> tuple[int, np.ndarray, np.ndarray]:
        """One turned and scaled digit: (its 0..9, coverage uint8 [h, w], ink bool [h, w]), cut tight around the ink."""
        digit = int(rng.integers(10))
        members = self.glyphs.by_digit[digit]
        glyph = self.glyphs.images[members[rng.integers(len(members))]]
        if self.rotation:
            glyph = glyph.rotate(rng.uniform(-self.rotation, self.rotation), Image.Resampling.BILINEAR, expand=True)
            glyph = glyph.crop(glyph.getbbox())
        longest = max(4, round(rng.integers(self.scale[0], self.scale[1] + 1) * shrink))
        factor = longest / max(glyph.size)
        size = (max(1, round(glyph.width * factor)), max(1, round(glyph.height * factor)))
        alpha = np.asarray(glyph.resize(size, Image.Resampling.BILINEAR))  # Pillow averages when it shrinks
        return digit, alpha, alpha >= 128

    def _place(self, rng: np.random.Generator) -> list[tuple[int, int, int, np.ndarray, np.ndarray]]:
        """Lays out one scene: (digit, top, left, coverage, ink) for every digit, in drawing order."""
        height, width = self.scene_size
        count = int(rng.integers(self.digits[0], self.digits[1] + 1))
        attempts, shrink = 0, 1.0
        while True:
            placed = []
            taken = np.zeros((height + 2, width + 2), bool)  # ink so far and the pixels next to it, with a border
            for _ in range(count):
                digit, alpha, ink = self._draw(rng, shrink)
                h, w = ink.shape
                # One draw gives all the places to try: the order of draws stays easy to reason about, and fast.
                tops = rng.integers(0, height - h + 1, _TRIES)
                lefts = rng.integers(0, width - w + 1, _TRIES)
                for y, x in zip(tops.tolist(), lefts.tolist(), strict=True):
                    if self.overlap == "allowed" or not (taken[y + 1 : y + 1 + h, x + 1 : x + 1 + w] & ink).any():
                        break
                else:
                    break  # no room for this one
                placed.append((digit, y, x, alpha, ink))
                for dy in range(3):
                    for dx in range(3):
                        taken[y + dy : y + dy + h, x + dx : x + dx + w] |= ink
            if len(placed) == count:
                return placed
            # Crowded: begin again, after a few attempts with smaller and smaller digits, so that this ends.
            attempts += 1
            if attempts > 3:
                shrink *= 0.95
