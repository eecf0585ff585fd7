"""Color spaces and gray, on arrays `[..., 3]`: sRGB, linear light, CIE XYZ and CIELAB under D65, CIEDE2000, luma.

sRGB values are in [0, 1] throughout (8-bit values divided by 255), L* in 0..100, a* and b* about -110..110. White is
the sRGB matrix's own (its rows summed up), so that every gray has a* = b* = 0, as in OpenCV; the difference to the
rounded white of CIE tables (scikit-image) is below 0.01 in any coordinate. All is float32 and has finite gradients, at
black and outside the gamut too, save where a chroma of exactly 0 has no hue (:func:`ciede2000`).
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.errors import check_name

# ITU-R BT.709 primaries, white D65: linear RGB to XYZ.
RGB_TO_XYZ = np.array(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]], np.float64
)
WHITE = RGB_TO_XYZ.sum(1)
_RELATIVE = RGB_TO_XYZ / WHITE[:, None]  # XYZ relative to white
_BACK = np.linalg.inv(_RELATIVE)
_DELTA = 6 / 29  # CIE 15: below this, the cube root goes on as a line

# Weights of gamma-coded R, G and B.
LUMA = {
    "bt601": (0.299, 0.587, 0.114),  # JPEG, OpenCV, Pillow, torchvision
    "bt709": (0.2126, 0.7152, 0.0722),
    "study_bgr": (0.114, 0.587, 0.299),  # BT.601 with red and blue swapped: OpenCV's BGR formula on RGB pictures
    "mean": (1 / 3, 1 / 3, 1 / 3),
}
GRAYS = (*LUMA, "lab_l")


def to_gray(rgb: jax.Array, formula: str = "bt601") -> jax.Array:
    """Gray pictures by a named formula; a gray picture stays as it is, whatever the formula.

    Args:
      rgb: float sRGB `[..., 3]` in [0, 1].
      formula: one of `GRAYS`: the luma formulas weigh gamma-coded values; "lab_l" is the gray of the same CIELAB L*.

    Returns:
      float32 `[...]`, gamma-coded as sRGB is.
    """
    check_name("gray formula", formula, GRAYS)
    rgb = rgb.astype(jnp.float32)
    if formula == "lab_l":
        return linear_to_srgb(_dot(srgb_to_linear(rgb), _RELATIVE[1]))
    return _dot(rgb, LUMA[formula])


def srgb_to_linear(rgb: jax.Array) -> jax.Array:
    """Gamma-coded sRGB to linear light, per channel (IEC 61966-2-1); below 0 the line at black goes on."""
    low = rgb <= 0.04045
    return jnp.where(low, rgb / 12.92, ((jnp.where(low, 1.0, rgb) + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(linear: jax.Array) -> jax.Array:
    """The inverse of :func:`srgb_to_linear`."""
    low = linear <= 0.0031308
    return jnp.where(low, 12.92 * linear, 1.055 * jnp.where(low, 1.0, linear) ** (1 / 2.4) - 0.055)


def rgb_to_lab(rgb: jax.Array) -> jax.Array:
    """sRGB `[..., 3]` in [0, 1] to CIELAB (L*, a*, b*), D65, 2 degrees observer: float32."""
    return _linear_to_lab(srgb_to_linear(rgb.astype(jnp.float32)))


def lab_to_rgb(lab: jax.Array) -> jax.Array:
    """The inverse of :func:`rgb_to_lab`; colors outside the gamut give values outside [0, 1], nothing is clipped."""
    return linear_to_srgb(_lab_to_linear(lab.astype(jnp.float32)))


def color_gray(gray: jax.Array, ab: jax.Array) -> jax.Array:
    """The picture with the L* of a gray picture and given chroma, in the gamut.

    Where sRGB has no such color, the chroma shrinks towards gray in linear light until it has: lightness stays exactly,
    where clipping the channels would change it.

    Args:
      gray: gamma-coded gray `[...]` in [0, 1].
      ab: a* and b*, `[..., 2]`.

    Returns:
      float32 sRGB `[..., 3]` in [0, 1].
    """
    luminance = srgb_to_linear(gray.astype(jnp.float32))[..., None]
    lightness = 116 * _cube_root(luminance) - 16
    linear = _lab_to_linear(jnp.concatenate([lightness, ab.astype(jnp.float32)], -1))
    # Mixing colors of one luminance keeps it. The share of color that every channel bears:
    difference = linear - luminance
    room = jnp.where(difference > 0, 1 - luminance, luminance)
    share = jnp.min(room / jnp.maximum(jnp.abs(difference), 1e-12), -1, keepdims=True)
    return jnp.clip(linear_to_srgb(luminance + jnp.clip(share, 0, 1) * difference), 0, 1)


def ciede2000(first: jax.Array, second: jax.Array) -> jax.Array:
    """The color difference CIEDE2000 (ISO/CIE 11664-6, all weights 1) of CIELAB colors `[..., 3]`: float32 `[...]`.

    As Sharma, Wu and Dalal write it out ("The CIEDE2000 color-difference formula: implementation notes", 2005).
    """
    (l1, a1, b1), (l2, a2, b2) = (jnp.moveaxis(lab.astype(jnp.float32), -1, 0) for lab in (first, second))

    def part7(chroma):  # sqrt(c^7 / (c^7 + 25^7)), without large powers
        ratio = (chroma / 25) ** 7
        return jnp.sqrt(ratio / (ratio + 1))

    stretch = 1.5 - 0.5 * part7((jnp.hypot(a1, b1) + jnp.hypot(a2, b2)) / 2)
    a1, a2 = stretch * a1, stretch * a2
    c1, c2 = jnp.hypot(a1, b1), jnp.hypot(a2, b2)
    h1, h2 = jnp.degrees(jnp.arctan2(b1, a1)) % 360, jnp.degrees(jnp.arctan2(b2, a2)) % 360
    colored = c1 * c2 > 0
    turn = h2 - h1
    turn = jnp.where(colored, jnp.where(jnp.abs(turn) <= 180, turn, turn - 360 * jnp.sign(turn)), 0.0)
    d_l, d_c, d_h = l2 - l1, c2 - c1, 2 * jnp.sqrt(c1 * c2) * jnp.sin(jnp.radians(turn / 2))
    # The mean hue lies on the shorter way between the two; without chroma on one side it is that of the other.
    middle = jnp.where(colored, (h1 + turn / 2) % 360, h1 * (c1 > 0) + h2 * (c2 > 0))
    light, c = (l1 + l2) / 2, (c1 + c2) / 2

    def cosine(degrees):
        return jnp.cos(jnp.radians(degrees))

    t = 1 - 0.17 * cosine(middle - 30) + 0.24 * cosine(2 * middle)
    t += 0.32 * cosine(3 * middle + 6) - 0.20 * cosine(4 * middle - 63)
    s_l = 1 + 0.015 * (light - 50) ** 2 / jnp.sqrt(20 + (light - 50) ** 2)
    s_c, s_h = 1 + 0.045 * c, 1 + 0.015 * c * t
    rotation = -2 * part7(c) * jnp.sin(jnp.radians(60 * jnp.exp(-(((middle - 275) / 25) ** 2))))
    light, c, h = d_l / s_l, d_c / s_c, d_h / s_h
    return jnp.sqrt(jnp.maximum(light**2 + c**2 + h**2 + rotation * c * h, 0))


def _linear_to_lab(linear: jax.Array) -> jax.Array:
    x, y, z = jnp.moveaxis(_cube_root(_mix(linear, _RELATIVE)), -1, 0)
    return jnp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _lab_to_linear(lab: jax.Array) -> jax.Array:
    y = (lab[..., 0] + 16) / 116
    roots = jnp.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    return _mix(jnp.where(roots > _DELTA, roots**3, 3 * _DELTA**2 * (roots - 4 / 29)), _BACK)


def _cube_root(t: jax.Array) -> jax.Array:
    """CIELAB's compression: the cube root, continued below (6 / 29)^3 by its tangent."""
    low = t <= _DELTA**3
    return jnp.where(low, t / (3 * _DELTA**2) + 4 / 29, jnp.cbrt(jnp.where(low, 1.0, t)))


def _mix(colors: jax.Array, matrix: np.ndarray) -> jax.Array:
    """Colors `[..., 3]` times a 3x3 matrix. Written out: a matrix unit would round its inputs to half precision."""
    return jnp.stack([_dot(colors, row) for row in matrix], -1)


def _dot(colors: jax.Array, weights) -> jax.Array:
    return sum(np.float32(weight) * colors[..., i] for i, weight in enumerate(weights))
