"""From pixels to tokens: patches, class tokens, and position tables that follow the size of the image."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.product import flat_product
from jax_densevit.layers.resize import resize_bilinear


def pad_to_multiple(x: jax.Array, multiple: int) -> jax.Array:
    """Pads `[B, H, W, C]` with zeros at the bottom and the right up to whole multiples (the "corner" padding)."""
    height, width = x.shape[1:3]
    return jnp.pad(x, ((0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0)))


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """`[B, h * P, w * P, C]` -> `[B, h, w, P * P * C]`: the pixels of each patch, row-major, channels last."""
    p, (batch, height, width, channels) = patch_size, images.shape
    x = images.reshape(batch, height // p, p, width // p, p, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // p, width // p, p * p * channels)


def unpatchify(patches: jax.Array, patch_size: int) -> jax.Array:
    """The inverse of :func:`patchify`: `[B, h, w, P * P * C]` -> `[B, h * P, w * P, C]`."""
    p, (batch, height, width, size) = patch_size, patches.shape
    x = patches.reshape(batch, height, width, p, p, size // p**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * p, width * p, size // p**2)


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for convolutions, kernels and biases: uniform in +-1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel size, as one matrix product over patches.

    Parameters: `kernel [P, P, C, D]`, `bias [D]` (the layout of a convolution; Google's checkpoints have the same).

    Attributes:
      hidden_size: D; patch_size: P.
      dtype: type of the computation.
    """

    hidden_size: int
    patch_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B, h * P, w * P, C]` -> `[B, h, w, D]`."""
        p, channels = self.patch_size, images.shape[-1]
        init = torch_uniform(p * p * channels)
        kernel = self.param("kernel", init, (p, p, channels, self.hidden_size))
        bias = self.param("bias", init, (self.hidden_size,))
        x = patchify(images.astype(self.dtype), p)
        kernel = kernel.astype(self.dtype).reshape(-1, self.hidden_size)
        return flat_product(x, kernel, (((3,), (0,)), ((), ()))) + bias.astype(self.dtype)


class Tokens(nn.Module):
    """Prepends class tokens to a grid of patch tokens and adds learned positions.

    Parameters: `cls_token [1, 1, D]`, `distillation_token [1, 1, D]` (where asked for) and `position_embedding
    [1, rows, D]`, rows in the order class, distillation, grid (row-major), as PyTorch checkpoints have them.

    Attributes:
      grid: native (height, width) of the position table, in patches.
      cls_token: whether a class token is prepended; distilled: whether DeiT's distillation token follows it.
      cls_position: whether these tokens have rows of the position table (big_vision's have none).
      pos_rule: how the table is resized to another grid, a name of :data:`POSITION_RULES`.
      dtype: type of the result.
    """

    grid: tuple[int, int]
    cls_token: bool = True
    distilled: bool = False
    cls_position: bool = True
    pos_rule: str = "timm"
    dtype: Any = jnp.float32

    @property
    def prefix(self) -> int:
        """How many tokens come before the grid."""
        return int(self.cls_token) + int(self.distilled)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, D]` -> `[B, prefix + h * w, D]`."""
        init = nn.initializers.normal(0.02)
        batch, height, width, channels = x.shape
        positioned = self.prefix if self.cls_position else 0
        rows = positioned + self.grid[0] * self.grid[1]
        table = self.param("position_embedding", init, (1, rows, channels))
        table = resize_positions(table, self.grid, (height, width), self.pos_rule, prefix=positioned)
        x = x.reshape(batch, height * width, channels) + table[:, positioned:].astype(self.dtype)
        names = ["cls_token"] * self.cls_token + ["distillation_token"] * self.distilled
        if not names:
            return x
        tokens = jnp.concatenate([self.param(name, init, (1, 1, channels)) for name in names], axis=1)
        if positioned:
            tokens = tokens + table[:, :positioned]
        tokens = jnp.broadcast_to(tokens.astype(self.dtype), (batch, len(names), channels))
        return jnp.concatenate([tokens, x], axis=1)


def resize_positions(
    table: jax.Array, grid: tuple[int, int], size: tuple[int, int], rule: str, prefix: int = 0
) -> jax.Array:
    """Resizes the grid part of a position table by the rule of a published system.

    Args:
      table: `[1, prefix + h * w, D]`, float32.
      grid: its (h, w).
      size: the wanted (h, w).
      rule: a name of :data:`POSITION_RULES`.
      prefix: how many first rows belong to class tokens: they stay as they are.

    Returns:
      `[1, prefix + height * width, D]`; the table itself when nothing changes.

    Raises:
      UserError: unknown rule.
    """
    check_name("rule for resizing position tables (pos_rule)", rule, POSITION_RULES)
    if tuple(grid) == tuple(size):
        return table
    x = table[:, prefix:].reshape(1, *grid, table.shape[-1])
    x = POSITION_RULES[rule](x.astype(jnp.float32), tuple(size)).reshape(1, size[0] * size[1], -1)
    return jnp.concatenate([table[:, :prefix], x.astype(table.dtype)], axis=1)


def _cubic_antialias(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "cubic", antialias=True)


def resize_bicubic(x: jax.Array, size: tuple[int, int], offset: float = 0.0) -> jax.Array:
    """PyTorch's bicubic (Keys' kernel with a = -0.75, clamped borders, corners not aligned, no antialiasing).

    `jax.image.resize` has a = -0.5 and renormalises at the borders: other numbers, by up to a quarter of the data's
    spread.

    Args:
      x: `[B, h, w, C]` float32.
      size: the wanted (height, width).
      offset: DINOv2 samples a grid of `size + offset` (it calls PyTorch with that scale factor and keeps `size`).
    """
    rows = jnp.asarray(_bicubic_matrix(x.shape[1], size[0], offset), x.dtype)
    columns = jnp.asarray(_bicubic_matrix(x.shape[2], size[1], offset), x.dtype)
    return jnp.einsum("yh,bhwc,xw->byxc", rows, x, columns, precision="highest")


def _bicubic_matrix(given: int, length: int, offset: float) -> np.ndarray:
    """`[length, given]` float64 weights; every row sums to one."""
    a = -0.75
    position = (np.arange(length) + 0.5) * (given / (length + offset)) - 0.5
    weights = np.zeros((length, given))
    for step in (-1, 0, 1, 2):
        index = np.floor(position) + step
        d = np.abs(position - index)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        taken = np.clip(index, 0, given - 1).astype(np.int64)
        np.add.at(weights, (np.arange(length), taken), np.where(d <= 1, near, far))
    return weights


# How published systems resize the grid of a position table to another image size.
POSITION_RULES = {
    "setr": resize_bilinear,  # SETR's repository, and mmseg's SETR configs
    "mmseg": resize_bicubic,  # mmseg's default
    "timm": _cubic_antialias,
    "hf": resize_bicubic,  # Hugging Face transformers
    "google": lambda x, size: resize_bilinear(x, size, align_corners=True),  # scipy's zoom of order 1
    "big_vision": lambda x, size: resize_bilinear(x, size, align_corners=True),
    "dinov2": lambda x, size: resize_bicubic(x, size, offset=0.1),
}


def native_grid(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """The grid of the position table of a model made for `image_size` (a side or (height, width), in pixels).

    Raises:
      UserError: the size is not a multiple of the patch.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % patch_size or width % patch_size or min(height, width) < patch_size:
        raise UserError(
            f"image_size={height}x{width}, the native size of the position table, is not a multiple of "
            f"patch_size={patch_size}; choose multiples (images themselves may have any size)."
        )
    return height // patch_size, width // patch_size
