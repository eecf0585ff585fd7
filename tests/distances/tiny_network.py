"""A network of five features with numbers that nobody trained, and the command `fid` with it:

python tiny_network.py --pictures FOLDER ...      the flags of `python -m jax_densevit.fid`
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit import fid
from jax_densevit.console import run_command
from jax_densevit.distances.networks import FeatureNetwork
from jax_densevit.models.efficientnet_lite import EfficientNetLite


def tiny_network() -> FeatureNetwork:
    """The same numbers every time."""
    widths = {"widths": (2, 2, 3, 3, 3, 3, 4), "repeats": (1,) * 7, "stem_width": 2, "head_width": 5}
    model = EfficientNetLite(num_classes=2, **widths)
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        near = {"scale": 2.0, "var": 1.0}.get(path[-1].key, 0.0)
        return (near + 0.5 * rng.uniform(-1, 1, leaf.shape)).astype(np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = jax.tree_util.tree_map_with_path(fill, shapes)
    return FeatureNetwork(
        "efficientnet_lite0", "fd_tiny", "kd_tiny", model, variables, "0" * 64, (32, 32), "clean", (127, 128)
    )


if __name__ == "__main__":
    fid.load_network = lambda *arguments: tiny_network()
    run_command(fid.main)
