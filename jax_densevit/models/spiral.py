"""Spiral decoder: segmentation patch by patch, from the centre of the picture outward.

The idea for which ViTSeg's report found no way to mask: as the eye sees most in the centre, a model "could make the
center of the image first, then fill in the surrounding details". A ViT without convolutions reads the picture; a
decoder writes the label patches in spiral order, each knowing all that were written before.

A patch is predicted as class logits of its pixels, not as colours. So each step is a distribution over label patches
(independent over the pixels of one patch, given the earlier patches and the picture), the product over steps is a
likelihood of the whole label map, and cross-entropy is its logarithm; a patch that is fed back is one of labels, as in
training. Colours are neither a distribution nor, between two classes' colours, a label.

Token t of the decoder sees the labels of patch t - 1 (a learned start at t = 0), the places of both patches, and the
raw pixels of patch t, as ViTSeg's decoder of a patch does; the rest of the picture comes by cross-attention.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.errors import UserError
from jax_densevit.layers.causal import Cache, DecoderBlock, decoder_macs
from jax_densevit.layers.embedding import (
    PatchEmbedding,
    native_grid,
    pad_to_multiple,
    patchify,
    resize_positions,
    unpatchify,
)
from jax_densevit.layers.fields import shared_fields
from jax_densevit.layers.transformer import EncoderOptions, layer_norm
from jax_densevit.models.output import DenseOutput
from jax_densevit.models.registry import register_model
from jax_densevit.models.vit import SIZES, backbone, backbone_macs


def spiral_order(height: int, width: int) -> np.ndarray:
    """The cells of a grid from its centre outward: int32 `[height * width]`, row-major indices.

    The walk starts at ((height - 1) // 2, (width - 1) // 2) and goes right, down, left, up, with run lengths 1, 1, 2,
    2, 3, 3, ...; cells outside of the grid are passed over. A grid that is taller than wide is walked down first, as if
    on its side.

    Every cell touches (by a side) an earlier one. Consecutive cells touch, too, wherever the sides differ by at most
    one; in longer grids the walk leaves and comes back on the other side. (A path of touching cells from the centre
    would not go outward there, and a single row has none.)
    """
    if height > width:
        across, down = np.divmod(spiral_order(width, height), height)
        return (down * width + across).astype(np.int32)
    y, x = (height - 1) // 2, (width - 1) // 2
    cells, run, direction = [(y, x)], 1, 0
    while len(cells) < height * width:
        for dy, dx in (((0, 1), (1, 0)), ((0, -1), (-1, 0)))[direction]:
            for _ in range(run):
                y, x = y + dy, x + dx
                if 0 <= y < height and 0 <= x < width:
                    cells.append((y, x))
        run, direction = run + 1, 1 - direction
    return np.array([y * width + x for y, x in cells], np.int32)


class SpiralDecoder(nn.Module):
    """The decoder; attributes as in :class:`Spiral`.

    Parameters: `label_embedding [P * P, K + 1, D]` (the last entry of each pixel: label unknown), `start [D]`,
    `label_positions` and `positions` `[1, h * w, D]`, `patches/{kernel,bias}`, `block_<i>` (`DecoderBlock`), `norm`,
    `head`.
    """

    num_classes: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    patch_size: int
    grid: tuple[int, int]
    pos_rule: str
    gelu: str
    norm_epsilon: float
    dropout: float
    attention: str
    dtype: Any

    def setup(self):
        init, pixels = nn.initializers.normal(0.02), self.patch_size**2
        table = (1, self.grid[0] * self.grid[1], self.hidden_size)
        self.label_embedding = self.param("label_embedding", init, (pixels, self.num_classes + 1, self.hidden_size))
        self.start = self.param("start", init, (self.hidden_size,))
        self.label_positions = self.param("label_positions", init, table)
        self.positions = self.param("positions", init, table)
        self.patches = PatchEmbedding(self.hidden_size, self.patch_size, self.dtype)
        self.block = [DecoderBlock(**shared_fields(self, DecoderBlock)) for _ in range(self.num_layers)]
        self.norm = layer_norm(self.norm_epsilon, self.dtype, None)
        self.head = nn.Dense(pixels * self.num_classes, kernel_init=init)
        self.drop = nn.Dropout(self.dropout)

    def prepare(self, images: jax.Array, order: np.ndarray) -> jax.Array:
        """What token t knows without any label, `[B, T, D]`: its pixels, its place, and the place of patch t - 1."""
        x = self.patches(images)
        grid = x.shape[1:3]
        here, before = (
            resize_positions(table, self.grid, grid, self.pos_rule)[0, order].astype(self.dtype)
            for table in (self.positions, self.label_positions)
        )
        before = jnp.concatenate([self.start[None].astype(self.dtype), before[:-1]])
        return x.reshape(len(x), -1, self.hidden_size)[:, order] + here + before

    def embed(self, labels: jax.Array) -> jax.Array:
        """Label patches, int32 `[..., P * P]` with K where unknown -> `[..., D]`."""
        one_hot = jax.nn.one_hot(labels, self.num_classes + 1, dtype=self.dtype)
        table = self.label_embedding.astype(self.dtype).reshape(-1, self.hidden_size)
        return one_hot.reshape(*labels.shape[:-1], -1) @ table

    def remember(self, tokens: jax.Array) -> list[Cache]:
        """The encoder's tokens `[B, S, D]` as keys and values for every block."""
        return [block.remember(tokens) for block in self.block]

    def __call__(self, prepared: jax.Array, labels: jax.Array, memory: list[Cache], train: bool) -> jax.Array:
        """All tokens at once, from the true labels `[B, T, P * P]` in spiral order -> logits `[B, T, P * P * K]`."""
        earlier = self.embed(labels[:, :-1])
        x = prepared + jnp.pad(earlier, ((0, 0), (1, 0), (0, 0)))
        x = self.drop(x, deterministic=not train)
        for block, remembered in zip(self.block, memory, strict=True):
            x = block(x, remembered, train=train)
        return self._logits(x)

    def write(self, prepared: jax.Array, known: np.ndarray, memory: list[Cache]) -> jax.Array:
        """Token after token, each from the most probable labels of the one before -> logits `[B, T, P * P * K]`.

        One scan over the tokens with caches of fixed size; its program does not grow with their number.

        Args:
          prepared: from :meth:`prepare`.
          known: bool `[T, P * P]`, False for pixels beyond the picture, whose labels training never knows either.
          memory: from :meth:`remember`.
        """
        batch, length = prepared.shape[:2]

        def step(decoder, carry, token):
            position, base, known = token
            labels, caches = carry
            x = (base + decoder.embed(labels) * (position > 0).astype(base.dtype))[:, None]
            new = []
            for block, remembered, cache in zip(decoder.block, memory, caches, strict=True):
                x, cache = block.step(x, remembered, cache, position)
                new.append(cache)
            logits = decoder._logits(x)[:, 0]
            labels = jnp.argmax(logits.reshape(batch, -1, decoder.num_classes), -1)
            labels = jnp.where(known, labels, decoder.num_classes).astype(jnp.int32)
            return (labels, new), logits

        labels = jnp.full((batch, self.patch_size**2), self.num_classes, jnp.int32)
        start = labels, [block.empty_cache(batch, length) for block in self.block]
        tokens = jnp.arange(length), prepared.swapaxes(0, 1), jnp.asarray(known)
        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        return scan(self, start, tokens)[1].swapaxes(0, 1)

    def _logits(self, x: jax.Array) -> jax.Array:
        return self.head(self.norm(x).astype(jnp.float32))


def _macs(model: "Spiral", size: tuple[int, int]) -> int:
    tokens = -(-size[0] // model.patch_size) * -(-size[1] // model.patch_size)
    pixels, width = model.patch_size**2, model.hidden_size
    ends = tokens * pixels * width * (3 + (model.num_classes + 1) + model.num_classes)
    blocks = decoder_macs(tokens, tokens, width, model.decoder_layers, model.mlp_size)
    return backbone_macs(model, size, 0) + ends + blocks


@register_model(
    "spiral",
    variants={f"{name}/16": {**SIZES[name], "patch_size": 16} for name in ("Ti", "S", "B")},
    default_variant="Ti/16",
    macs=_macs,
    image_size=(256, 256),
    num_classes=19,
)
class Spiral(EncoderOptions):
    """Autoregressive segmentation in spiral order; see the head of this file. Train it with the task "spiral".

    Parameters: `backbone/...` (`vit.Backbone` without a class token), `norm`, `decoder/...` (:class:`SpiralDecoder`).

    Attributes:
      num_classes: K.
      hidden_size, num_layers, num_heads, mlp_size, patch_size: of the encoder; the decoder has the same sizes and
        `decoder_layers` blocks.
      image_size: a side or (height, width): the native size of the position tables. Images may have any size.
      dropout: of encoder and decoder; drop_path, scan, remat: of the encoder.
      Others: see `vit.Backbone`.
    """

    num_classes: int = 19
    hidden_size: int = 192
    num_layers: int = 12
    num_heads: int = 3
    mlp_size: int = 768
    decoder_layers: int = 4
    patch_size: int = 16
    image_size: int | tuple[int, int] = (256, 256)
    pos_rule: str = "timm"

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None, train: bool = False) -> DenseOutput:
        """`[B, H, W, 3]` normalised images of any size -> logits `[B, h * P, w * P, K]`.

        The image is padded with zeros at the bottom and the right up to h x w whole patches.

        Args:
          images: the pictures.
          labels: integers `[B, H, W]`, 0 to K - 1, anything else meaning unknown: every patch is predicted from the
            true labels of the earlier ones. None: from the most probable labels of the earlier ones, one by one.
          train: training mode; needs `labels`.
        """
        if labels is None and self.is_initializing():
            labels = jnp.zeros(images.shape[:3], jnp.int32)
        if labels is None and train:
            raise UserError(
                "The spiral decoder learns each patch of labels from the earlier ones, so training gives it the labels "
                "beside the images: use the task 'spiral'."
            )
        p, k, size = self.patch_size, self.num_classes, images.shape[1:3]
        images = pad_to_multiple(images, p)
        height, width = images.shape[1:3]
        grid = height // p, width // p
        order = spiral_order(*grid)
        tokens = backbone(self, cls_token=False)(images, train=train)[self.num_layers]
        tokens = layer_norm(self.norm_epsilon, self.dtype, "norm")(tokens)
        own = {"num_layers": self.decoder_layers, "grid": native_grid(self.image_size, p)}
        decoder = SpiralDecoder(**shared_fields(self, SpiralDecoder) | own, name="decoder")
        prepared, memory = decoder.prepare(images, order), decoder.remember(tokens)
        more = (0, height - size[0]), (0, width - size[1])

        def patches(values):  # [N, height, width] -> [N, T, P * P] in spiral order
            return patchify(values[..., None], p).reshape(len(values), -1, p * p)[:, order]

        if labels is None:
            known = np.asarray(patches(np.pad(np.ones((1, *size), bool), ((0, 0), *more)))[0])
            logits = decoder.write(prepared, known, memory)
        else:
            labels = labels.astype(jnp.int32)
            labels = jnp.where((labels >= 0) & (labels < k), labels, k)
            labels = jnp.pad(labels, ((0, 0), *more), constant_values=k)
            logits = decoder(prepared, patches(labels), memory, train)
        logits = logits[:, np.argsort(order)].reshape(len(images), *grid, -1)
        return DenseOutput(
            logits=unpatchify(logits, p),
            features={"tokens": tokens.reshape(len(images), *grid, -1)},
            covers=(height, width),
        )
