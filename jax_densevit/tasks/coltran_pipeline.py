"""From a gray photograph to a colored one: ColTran's three stages as a chain.

The colorizer samples coarse colors, the color upsampler gives them all their bits, the spatial upsampler all their
pixels; both upsamplers take the likeliest values, so that all chance lies in the colorizer. Each stage sees its own
gray picture, made from the photo as in training. The photo then keeps its own lightness at its own size and takes the
chroma of the last stage, for which 256 x 256 pixels suffice: eyes see color less sharply than light.

The upsamplers may be left out, from the end: a colorizer alone gives a photo its 512 colors in 64 x 64 pixels.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.errors import UserError
from jax_densevit.layers.bits import convert_bits, from_symbols, gray_from_int32
from jax_densevit.layers.color import color_gray, rgb_to_lab, to_gray
from jax_densevit.layers.resize import resize_area
from jax_densevit.models.coltran.sampling import SYMBOLS, sample_colors
from jax_densevit.models.coltran.upsampling import sample_channels
from jax_densevit.tasks import coltran
from jax_densevit.tasks.coltran_colorizer import BITS
from jax_densevit.tasks.rooms import Samples, give_room, samples
from jax_densevit.tasks.rows import map_over_pixels


class Stage(NamedTuple):
    """A trained stage: its task, its Flax module and its parameters."""

    task: Any
    model: Any
    params: dict


class Pipeline:
    """The chain; all its methods are pure. A photo's answer does not depend on which others are asked beside it.

    Args:
      colorizer, color, spatial: the stages; None for one that is left out.
      temperature: of the colorizer's distribution; 1 samples what was trained, 0 takes the likeliest color.
      top_k, statistics, method: see `models.coltran.sampling.sample_colors`.

    Raises:
      UserError: stages whose sizes do not fit together, a spatial upsampler without a color upsampler.
    """

    def __init__(
        self,
        colorizer: Stage,
        color: Stage | None = None,
        spatial: Stage | None = None,
        *,
        temperature: float = 1.0,
        top_k: int = SYMBOLS,
        statistics: str = "exact",
        method: str = "cached",
    ):
        if spatial is not None and color is None:
            raise UserError("The spatial upsampler goes on from the color upsampler's pictures: name that one too.")
        self.colorizer = colorizer
        self.upsamplers = tuple(stage for stage in (color, spatial) if stage is not None)
        for before, stage in zip(self.stages, self.upsamplers, strict=False):
            if stage.task.coarse_size != before.task.image_size:
                raise UserError(
                    f"The {stage.task.name} starts from pictures of {_sides(stage.task.coarse_size)}, but the stage "
                    f"before it makes {_sides(before.task.image_size)}: train both for the same size."
                )
        options = {"temperature": temperature, "top_k": top_k, "statistics": statistics, "method": method}

        def draw(params, gray, keys):
            drawn = sample_colors(colorizer.model, params, gray, keys, **options)
            return drawn.symbols, drawn.passes  # not the logits, 8 MB a picture

        self._draw = jax.jit(draw)
        self._upsample = [jax.jit(functools.partial(sample_channels, stage.model)) for stage in self.upsamplers]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those that there are, in their order."""
        return (self.colorizer, *self.upsamplers)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the last stage's pictures."""
        return self.stages[-1].task.image_size

    def middle(self, image: np.ndarray) -> np.ndarray:
        """The part of a photo `[H, W, 3]` that the stages were trained on, its largest window of their proportions."""
        return coltran.middle(image[None], self.colorizer.task.image_size)[0]

    def look(self, image: np.ndarray) -> list[np.ndarray]:
        """The gray pictures of the stages, int32 `[h, w]` each, from a photo uint8 `[H, W, 3]` of any size.

        All of the photo, squeezed to the proportions of the stages. A gray photo's pictures are those of its neutral
        colors: one level darker, as in training.
        """
        grays = []
        for stage in self.stages:
            photo = resize_area(image[None], stage.task.photo_size)
            grays.append(np.asarray(gray_from_int32(resize_area(photo, stage.task.image_size)))[0])
        return grays

    def sample(self, grays: np.ndarray, keys: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Draws colors for gray pictures of the first stage `[B, h, w]` with keys `[B, S]`: (symbols int32
        `[B, S, h, w]`, sequential steps that each row took int32 `[B, S, h]`).
        """
        return jax.device_get(self._draw(self.colorizer.params, grays, keys))

    def finish(self, symbols: np.ndarray, grays: list[np.ndarray]) -> np.ndarray:
        """The last stage's picture uint8 `[h, w, 3]` of symbols `[h, w]`, given the photo's gray pictures.

        Without upsamplers a color stands in the middle of its bin, not at the lower edge as the upsamplers know it.
        """
        values = from_symbols(symbols)
        if not self.upsamplers:
            return np.asarray(convert_bits(values, BITS, 8) + 2 ** (7 - BITS), np.uint8)
        picture, bits = values[None], BITS
        for stage, upsample, gray in zip(self.upsamplers, self._upsample, grays[1:], strict=True):
            picture = upsample(stage.params, convert_bits(picture, bits, stage.model.bits), gray[None])
            bits = 8
        return np.asarray(picture[0], np.uint8)


def paint(image: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """A photo uint8 `[H, W, 3]` with its own CIELAB lightness and the chroma of a picture uint8 `[h, w, 3]`, stretched.

    Where sRGB has no color that light and that strong, it is as strong as there is.
    """
    size, chroma = image.shape[:2], picture
    smaller = min(size[0], picture.shape[0]), min(size[1], picture.shape[1])
    if smaller != picture.shape[:2]:
        chroma = resize_area(picture, smaller).astype(np.uint8)
    roomy = give_room({"image": image[None]}, {})["image"]
    down, across = (samples(smaller[i], size[i], room=roomy.shape[1 + i]) for i in (0, 1))
    painted = _paint(roomy, chroma[None], down, across)
    return np.asarray(painted)[0, : size[0], : size[1]]


@jax.jit
def _paint(image: jax.Array, picture: jax.Array, down: Samples, across: Samples) -> jax.Array:
    def pixels(chroma, image):
        gray = to_gray(image.astype(jnp.float32) / 255, "lab_l")
        return jnp.round(255 * color_gray(gray, chroma)).astype(jnp.uint8)

    chroma = rgb_to_lab(picture.astype(jnp.float32) / 255)[..., 1:]
    return map_over_pixels(pixels, chroma, down, across, image)


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
