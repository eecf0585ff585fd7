"""Tiny ColTran models whose parameters are all at work: no zeros or ones left from the initialisation."""

import jax
import numpy as np

from jax_densevit.models.registry import create_model, example_inputs

SIZE = (3, 4)
WIDTH = {"hidden_size": 8, "mlp_size": 12, "num_heads": 2}
LAYERS = {"encoder_layers": 1, "outer_layers": 2, "inner_layers": 2}


def colorizer(**options):
    return create_model("coltran_colorizer", **{"image_size": SIZE, **WIDTH, **LAYERS, **options})


def upsampler(stage="color", **options):
    return create_model(f"coltran_{stage}_upsampler", **{"image_size": SIZE, "num_layers": 2, **WIDTH, **options})


def parameters(model, seed=0):
    """Random numbers for every parameter, of the size that keeps signals alive; nothing is compiled for them."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *example_inputs(model, model.image_size))["params"]

    def draw(path, leaf):
        name = path[-1].key
        spread = (0.4 if leaf.ndim > 1 else 0.2) if "embedding" not in name else 1.0
        return rng.normal(float(name in ("scale", "pool")), spread, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def picture(batch, size=SIZE, seed=2):
    """Random (gray, symbols), int32."""
    rng = np.random.default_rng(seed)
    gray, symbols = (rng.integers(0, top, (batch, *size), dtype=np.int32) for top in (255, 512))
    return gray, symbols
