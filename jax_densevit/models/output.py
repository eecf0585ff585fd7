"""What models return: one struct for dense predictions, one for objects, one for classes, two for symbols."""

import flax.struct
import jax


@flax.struct.dataclass
class DenseOutput:
    """Predictions of a dense model, at the resolutions where its heads computed them.

    A model does not resize its logits to the image: that last bilinear step is fused with the loss (by row blocks) or
    with decoding, so full-size logits of several heads are never in memory together.

    Attributes:
      logits: `[B, h, w, K]` float32. For regression these are the K output channels of the picture.
      auxiliary: `[B, h_i, w_i, K]` float32 each, the auxiliary heads, in the order of the model's documentation.
        Empty when the model has none or was called with `train=False`.
      features: intermediate maps by name (`[B, h, w, C]`), filled only by models that document them.
      covers: (height, width) in pixels of the image area that `logits` and `auxiliary` stretch over. It is the input
        size, or larger where the model padded the bottom and the right inside: resize the logits to `covers`, then cut
        `[:H, :W]`.
    """

    logits: jax.Array
    auxiliary: tuple[jax.Array, ...] = ()
    features: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    covers: tuple[int, int] = flax.struct.field(pytree_node=False, default=(0, 0))


@flax.struct.dataclass
class QueryOutput:
    """Predictions of a model that answers with a set of queries, each of them for one object or for none.

    Attributes:
      class_logits: `[B, Q, K+1]` float32, the last entry for "no object".
      mask_logits: `[B, Q, h, w]` float32, at the head's own resolution; they stretch over `covers`, as those of
        :class:`DenseOutput`. A logit of 0 is a probability of one half.
      boxes: `[B, Q, 4]` float32 (cx, cy, w, h) in [0, 1] of the area `covers`, or None.
      box_masks: `[B, Q, r, r]` float32 logits in the coordinates of `boxes`; `mask_logits` then is what they are when
        pasted (:func:`~jax_densevit.layers.boxes.paste_masks`). None for other heads.
      auxiliary: the same of earlier layers, first layer first, with `train=True` only; each without `auxiliary`.
      features: arrays by name, filled by models that document them.
      covers: (height, width) in pixels of the image area that masks and boxes stretch over, as in
        :class:`DenseOutput`.
    """

    class_logits: jax.Array
    mask_logits: jax.Array
    boxes: jax.Array | None = None
    box_masks: jax.Array | None = None
    auxiliary: tuple["QueryOutput", ...] = ()
    features: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    covers: tuple[int, int] = flax.struct.field(pytree_node=False, default=(0, 0))


@flax.struct.dataclass
class ClassOutput:
    """Predictions of an image classifier.

    Attributes:
      logits: `[B, K]` float32.
      auxiliary: further `[B, K]` float32, in training only, where the model documents them.
      features: intermediate arrays by name, where the model documents them.
    """

    logits: jax.Array
    auxiliary: tuple[jax.Array, ...] = ()
    features: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class SymbolOutput:
    """Distributions over the symbol of every pixel, from an autoregressive model.

    Attributes:
      logits: `[B, H, W, K]` float32, of each pixel given those before it in raster order (and whatever conditions it).
      parallel: `[B, H, W, K]` float32, of each pixel by itself, given the condition alone; None without such a head.
    """

    logits: jax.Array
    parallel: jax.Array | None = None


@flax.struct.dataclass
class ChannelOutput:
    """Distributions over the 256 values of every sub-pixel, channel by channel.

    Attributes:
      logits: `[B, C, H, W, 256]` float32, in the order of the channels given.
    """

    logits: jax.Array
