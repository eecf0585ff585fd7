"""Colors from a ColTran colorizer: pixel by pixel from the trained distribution, with no work done twice.

The published sampler runs the whole inner decoder on a row for every pixel, and the whole outer decoder on the picture
for every row: 14.1 TFLOP for 64 x 64 pixels. Here z, and what depends on z alone, is computed once, the outer decoder
advances row by row and the inner one pixel by pixel, each with the keys and values of what came before: 0.33 TFLOP, as
many as one pass of training. Rows and columns are two nested scans, so that one program draws a batch of pictures.

What bounds it: a pixel reads all weights of the inner decoder and its head (13.6 MB at full width, float32) for 7 MFLOP
a picture, so a batch costs little more than one picture until its products take longer than that reading, on a
CPU from two pictures on (`docs/benchmarks.md`).
`method="jacobi"` makes products of whole rows again: it guesses a row's colors, computes all its logits at once, draws
again with the same noise, and stops when nothing changes. Colors depend on those to their left alone, so a pass settles
at least one more pixel, in effect several, and what the last pass confirms is what drawing pixel by pixel finds.

The noise of every pixel is a function of its picture's key and its place. So a picture does not depend on which others
are drawn with it, nor on the method (but for ties: sums in another order may differ in the last digit).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError, check_name
from jax_densevit.models.coltran.colorizer import SYMBOLS, Colorizer

METHODS = ("cached", "jacobi", "parallel", "naive")
STATISTICS = ("exact", "official")


class ColorSamples(NamedTuple):
    """What :func:`sample_colors` draws. "..." are the axes of its keys: pictures, or pictures and samples of each.

    Attributes:
      symbols: int32 `[..., H, W]` in 0..511.
      logits: float32 `[..., H, W, 512]`, from which each was drawn: before temperature and top-k.
      passes: int32 `[..., H]`, sequential steps that each row took: W pixel by pixel; with "jacobi" the passes until
        the row did not change any more, the last of which only confirms it; 1 in parallel.
    """

    symbols: jax.Array
    logits: jax.Array
    passes: jax.Array


def picture_keys(seed: int, examples: jax.Array, samples: int | None = None) -> jax.Array:
    """Random keys of pictures, from nothing but a seed and each picture's own number.

    Args:
      seed: of a whole run.
      examples: int `[B]`, numbers that the pictures keep in every run, say their index in the dataset.
      samples: how many different samples to draw of each; None for one, without an axis for it.

    Returns:
      Keys `[B]`, or `[B, samples]`, of which the first `k` samples are those of `samples=k`. The generator is named, so
      that the `jax_default_prng_impl` of a machine does not matter.
    """
    root = jax.random.key(seed, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(root, jnp.asarray(examples, jnp.uint32))
    count = jnp.arange(1 if samples is None else samples, dtype=jnp.uint32)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)), in_axes=(0, None))(keys, count)
    return keys[:, 0] if samples is None else keys


def sample_colors(
    model: Colorizer,
    params: dict,
    gray: jax.Array,
    keys: jax.Array,
    temperature: float | jax.Array = 1.0,
    *,
    top_k: int = SYMBOLS,
    statistics: str = "exact",
    method: str = "cached",
) -> ColorSamples:
    """Draws the colors of gray pictures. Pure: jit it over `params`, `gray`, `keys` and `temperature`.

    Args:
      model: the colorizer; params: its parameters.
      gray: int `[B, H, W]` in 0..255, of the size the model is made for.
      keys: `[B]`, or `[B, S]` for S samples of each picture (which share what depends on the gray picture alone); see
        :func:`picture_keys`.
      temperature: of the distribution; 1 samples what was trained, 0 takes the likeliest symbol.
      top_k: how many of the likeliest symbols may be drawn.
      statistics: "exact" averages the conditions of norms over the picture, as in training; "official" row by row, as
        the published sampler does (whose samples are therefore not quite from the trained distribution).
      method: "cached"; "jacobi", the same samples in fewer, larger steps; "naive", the same samples by a pass of the
        whole model for every pixel, to check the others against; or "parallel", every pixel by itself from the second
        head: other samples, whose neighbors know nothing of each other, for the price of the gray encoder.

    Raises:
      UserError: an unknown method or statistics, `top_k` outside 1..512, a negative temperature, another size of gray,
        "parallel" of a model without the second head.
    """
    check_name("sampling method", method, METHODS)
    check_name("statistics of a sampler's norms", statistics, STATISTICS)
    if not 1 <= top_k <= SYMBOLS:
        raise UserError(f"top_k={top_k} is not one of 1..{SYMBOLS}, the number of symbols to choose from.")
    if not isinstance(temperature, jax.core.Tracer) and not temperature >= 0:
        raise UserError(f"temperature={temperature} is negative; 1 samples the model, 0 takes the likeliest color.")

    def draw(logits: jax.Array, noise: jax.Array) -> jax.Array:
        return choose(logits, noise, temperature, top_k)

    bound = model.bind({"params": params})
    by_row = statistics == "official"
    flat = keys.reshape(-1)
    samples = flat.shape[0] // gray.shape[0]
    if method == "naive":
        drawn = _draw_naively(bound, jnp.repeat(gray, samples, 0), flat, draw, by_row)
    elif method == "parallel":
        drawn = _draw_in_parallel(bound, gray, flat, draw)
    else:
        row = _row_by_passes if method == "jacobi" else _row_by_pixels
        drawn = _draw_rows(bound, gray, flat, draw, by_row, row)
    return ColorSamples(*(x.reshape(*keys.shape, *x.shape[1:]) for x in drawn))


def choose(
    logits: jax.Array, noise: jax.Array, temperature: float | jax.Array = 1.0, top_k: int | None = None
) -> jax.Array:
    """Logits and Gumbel noise `[..., K]` -> the symbols drawn, int32 `[...]`.

    `argmax(logits + temperature * noise)` is a draw from `softmax(logits / temperature)`, without a division that
    temperature 0 would not survive. `top_k` keeps the likeliest, and what ties with the last of them.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jnp.argmax(logits + temperature * noise, axis=-1).astype(jnp.int32)


def row_noise(keys: jax.Array, row: jax.Array, width: int) -> jax.Array:
    """Gumbel noise of one row of pictures with `keys` `[B]`: float32 `[B, W, 512]`."""
    rows = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, row)
    return jax.vmap(lambda key: jax.random.gumbel(key, (width, SYMBOLS)))(rows)


def _draw_rows(model, gray, keys, draw, by_row, draw_row):
    """Row by row: `draw_row` gives its (symbols, logits, passes), the outer decoder what the next one knows of it."""
    (height, width), samples = model.size, keys.shape[0] // gray.shape[0]
    z = model.encode(gray)

    def spread(tree):  # [B, ...] -> [B * samples, ...]
        return jax.tree.map(lambda x: jnp.repeat(x, samples, 0), tree) if samples > 1 else tree

    outer_norms, inner_norms = spread(model.outer_norms(z)), model.inner_norms(z, by_row)

    def row(carry, index):
        u, cache = carry
        z_gray = jax.lax.dynamic_index_in_dim(z, index, 1, False)
        z_row = spread(z_gray)
        norms = spread(jax.tree.map(lambda c: c[:, index if by_row else 0], inner_norms))
        drawn = draw_row(model, u, z_row, index, norms, row_noise(keys, index, width), draw)
        conditions = spread(model.outer_conditions(z_gray))
        below, cache = model.outer_row(model.embed(drawn[0]), z_row, index, conditions, outer_norms, cache)
        return (below, cache), drawn

    # Row 0 knows no colors above it.
    start = (jnp.zeros((keys.shape[0], width, z.shape[-1]), z.dtype), model.outer_cache(keys.shape[0]))
    _, drawn = jax.lax.scan(row, start, jnp.arange(height))
    return [x.swapaxes(0, 1) for x in drawn]


def _row_by_pixels(model, u, z, row, norms, noise, draw):
    batch, width = u.shape[:2]
    # Columns first: a step reads one piece.
    conditions = model.inner_conditions(u.swapaxes(0, 1), z.swapaxes(0, 1))
    inputs = model.inner_inputs(u, z, row).swapaxes(0, 1)

    def pixel(carry, here):
        left, cache = carry
        column, inputs, conditions, noise = here
        hidden, cache = model.inner_step(inputs + left, column, conditions, norms, cache)
        logits = model.logits(hidden)
        symbols = draw(logits, noise)
        return (model.embed(symbols), cache), (symbols, logits)

    start = (jnp.zeros_like(u[:, 0]), model.inner_cache(batch))
    columns = (jnp.arange(width), inputs, conditions, noise.swapaxes(0, 1))
    _, (symbols, logits) = jax.lax.scan(pixel, start, columns)
    return symbols.swapaxes(0, 1), logits.swapaxes(0, 1), jnp.full(batch, width, jnp.int32)


def _row_by_passes(model, u, z, row, norms, noise, draw):
    batch, width = u.shape[:2]
    conditions, inputs = model.inner_conditions(u, z), model.inner_inputs(u, z, row)

    def again(state):
        symbols, _, passes, changing = state
        logits = model.logits(model.inner_row(model.embed(symbols), inputs, conditions, norms))
        drawn = draw(logits, noise)
        # A picture that stopped changing stays: its count does not depend on the others'. The first pass draws from
        # guesses, and W of them settle W pixels: none is needed to confirm the last.
        passes += changing
        changing &= (drawn != symbols).any(-1) & (passes < width)
        return drawn, logits, passes, changing

    # The second head guesses with the same noise, so that it is right wherever both heads agree well enough.
    guess = draw(model.parallel_logits(z), noise) if model.parallel_head else draw(jnp.zeros_like(noise), noise)
    start = (guess, jnp.zeros_like(noise), jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool))
    return jax.lax.while_loop(lambda state: state[-1].any(), again, start)[:3]


def _draw_in_parallel(model, gray, keys, draw):
    """All pixels at once, each by itself, with the noise that the other methods have there."""
    if not model.parallel_head:
        raise UserError('The sampling method "parallel" needs the second head, which this colorizer does not have.')
    height, width = model.size
    logits = model.parallel_logits(model.encode(gray))
    logits = jnp.repeat(logits, keys.shape[0] // gray.shape[0], 0)
    noise = jax.vmap(lambda row: row_noise(keys, row, width), out_axes=1)(jnp.arange(height))
    return draw(logits, noise), logits, jnp.ones((keys.shape[0], height), jnp.int32)


def _draw_naively(model, gray, keys, draw, by_row):
    """A pass of the whole model for every pixel."""
    batch, height, width = gray.shape

    def pixel(index, state):
        symbols, kept = state
        row, column = index // width, index % width
        z, e = model.encode(gray), model.embed(symbols)
        logits = model.logits(model.inner(e, model.outer(e, z), z, by_row))[:, row, column]
        drawn = draw(logits, row_noise(keys, row, width)[:, column])
        return symbols.at[:, row, column].set(drawn), kept.at[:, row, column].set(logits)

    start = (jnp.zeros(gray.shape, jnp.int32), jnp.zeros((*gray.shape, SYMBOLS)))
    symbols, logits = jax.lax.fori_loop(0, height * width, pixel, start)
    return symbols, logits, jnp.full((batch, height), width, jnp.int32)
