"""Models on eight devices in several layouts, against one device: shared by the tests and `soak_layouts.py`.

Each is trained for some steps from the same drawn parameters. Losses, norms of gradients and parameters afterwards then
say whether forward pass, backward pass and optimizer are those of one device.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
import optax
from tiny_training import Training, tiny_config

from jax_densevit.data.source import DataInfo
from jax_densevit.models import create_model
from jax_densevit.models.registry import example_inputs, find_model
from jax_densevit.tasks import create_task
from jax_densevit.training.mesh import make_mesh, put_batch
from jax_densevit.training.paths import named_leaves
from jax_densevit.training.sharding import like_parameters, parameter_shardings

LAYOUTS = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "fsdp and tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}
CLASSES = DataInfo("tiny", classes=("a", "b", "c"))
OBJECTS = DataInfo("tiny", classes=("nothing", "a", "b"), things=("a", "b"))
PHOTOS = DataInfo("tiny")
VIT = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_size": 32, "patch_size": 4, "image_size": 16}
COLTRAN = {"hidden_size": 16, "mlp_size": 16, "num_heads": 2, "image_size": 8}

# Model, its options, task, its options, side of the pictures. Sizes are the smallest that eight devices divide.
TINY: dict[str, tuple[str, dict, str, dict, int]] = {
    "setr": (
        "setr_naive",
        {**VIT, "head_channels": 8, "taps": (2,), "auxiliary": False, "scan": True, "remat": "full"},
        "segmentation",
        {},
        16,
    ),
    "dpt": (
        "dpt",
        {
            **VIT,
            "num_layers": 4,
            "reassemble": (8,) * 4,
            "features": 8,
            "auxiliary": False,
            "patch_size": 16,
            "image_size": 32,
        },
        "segmentation",
        {},
        32,
    ),
    "uformer": (
        "uformer",
        {"base": 8, "depths": (2, 0, 0, 0, 1, 0, 0, 0, 1), "heads": (2,) * 9, "window": 4},
        "colorization",
        {},
        16,
    ),
    "unet": ("unet", {"base": 8}, "segmentation", {}, 16),
    "axial": (
        "axial",
        {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "mlp_size": 16, "scan": True},
        "segmentation",
        {},
        8,
    ),
    "colorizer": (
        "coltran_colorizer",
        {"variant": "tiny", **COLTRAN},
        "coltran_colorizer",
        {"image_size": 8, "photo_size": 8},
        8,
    ),
    "color upsampler": (
        "coltran_color_upsampler",
        {"variant": "tiny", **COLTRAN},
        "coltran_color_upsampler",
        {"image_size": 8, "coarse_size": 8, "photo_size": 8},
        8,
    ),
    "spatial upsampler": (
        "coltran_spatial_upsampler",
        {"variant": "tiny", **COLTRAN},
        "coltran_spatial_upsampler",
        {"image_size": 8, "coarse_size": 4, "photo_size": 8},
        8,
    ),
    "instance_seq2seg": (
        "instance_seq2seg",
        {**VIT, "num_layers": 1, "num_queries": 4, "mask_head": "embedding", "embedding_size": 8},
        "instances",
        {"slots": 3},
        16,
    ),
    "hungarian_unet": ("hungarian_unet", {"base": 8, "num_queries": 4}, "instances", {"slots": 3}, 16),
}

# Published models: name, variant, options.
PUBLISHED = (
    ("setr_pup", "B/16", {"scan": True}),
    ("setr_pup", "B/16", {}),
    ("uformer", "B", {}),
    ("dpt", "base", {}),
    ("unet", "64", {}),
    ("axial", "128", {}),
    ("coltran_colorizer", "ColTran", {}),
    ("coltran_color_upsampler", "ColTran", {}),
    ("coltran_spatial_upsampler", "ColTran", {}),
    ("instance_seq2seg", "token", {}),
    ("hungarian_unet", "32", {}),
    ("unet_lite", "lite0", {}),
)


def pictures(side: int, task: str) -> dict[str, np.ndarray]:
    """A batch of eight: the share of ignored pixels differs from row to row, and so does the number of objects."""
    rng = np.random.default_rng(5)
    batch = {
        "image": rng.integers(0, 256, (8, side, side, 3)).astype(np.uint8),
        "seed": rng.integers(0, 2**32, (8, 2), dtype=np.uint32),
    }
    if task == "segmentation":
        labels = rng.integers(0, 3, (8, side, side)).astype(np.uint8)
        labels[rng.random(labels.shape) < np.linspace(0, 0.9, 8)[:, None, None]] = 255
        batch["labels"] = labels
    elif task == "instances":
        labels, instances = np.zeros((8, side, side), np.uint8), np.zeros((8, side, side), np.uint16)
        for row in range(8):
            for number in range(row % 4):
                top, left = rng.integers(0, side // 2, 2)
                area = np.s_[row, top : top + side // 3, left : left + side // 2]
                labels[area], instances[area] = 1 + number % 2, number + 1
        batch |= {"labels": labels, "instances": instances}
    return batch


def subject(name: str, table: dict = TINY) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """(model, task, batch) of an entry of the table."""
    model, options, task, task_options, side = table[name]
    infos = {"segmentation": CLASSES, "instances": OBJECTS}
    made = create_task(task, infos.get(task, PHOTOS), **task_options)
    if task in infos or task == "colorization":
        options = {**options, "num_classes": made.num_outputs}
    return create_model(model, **options), made, pictures(side, task)


def draw(state: Any, shardings: Any) -> Any:
    """A state of numbers drawn by NumPy, the same for every layout; nothing is compiled for it."""
    rng = np.random.default_rng(3)

    def params(path, leaf):
        values = rng.normal(size=leaf.shape)
        if path[-1].key in ("scale", "var", "pool"):
            return (1 + 0.1 * values).astype(leaf.dtype)
        return (values * (0.1 if leaf.ndim < 2 else (leaf.size / leaf.shape[-1]) ** -0.5)).astype(leaf.dtype)

    drawn = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
    drawn = drawn.replace(
        params=jax.tree_util.tree_map_with_path(params, state.params),
        statistics=jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), state.statistics),
    )
    return jax.device_put(drawn, shardings)


def trained(model: Any, task: Any, batch: dict[str, np.ndarray], mesh: Any, steps: int = 2, **options: Any):
    """(numbers of every step, the state afterwards, on the host; bytes of parameters and optimizer by device)."""
    config = tiny_config(learning_rate=0.01, clip_norm=1.0)
    training = Training(model=model, task=task, batch=batch, mesh=mesh, config=config, start=draw, **options)
    # XLA's older code generator for the CPU: it compiles in a third of the time, which here is nearly all of it.
    lowered = training.step.lower(training.state, put_batch(batch, mesh))
    training.step = lowered.compile(compiler_options={"xla_cpu_use_fusion_emitters": False})
    held = bytes_by_device((training.state.params, training.state.optimizer))
    numbers = [training.run() for _ in range(steps)]
    return numbers, jax.device_get(training.state), held


@functools.cache
def alone() -> jax.sharding.Mesh:
    """The mesh of one device."""
    return make_mesh(devices=jax.devices()[:1])


def bytes_by_device(tree: Any) -> dict[Any, int]:
    """Bytes that every device holds of a tree of arrays."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return held


def largest_difference(first: Any, second: Any) -> tuple[float, str]:
    """The largest difference of two trees, each leaf relative to its largest value or 1; and where it is."""
    one, two = named_leaves(first), named_leaves(second)
    worst = (0.0, "")
    for name, value in one.items():
        value, other = np.asarray(value, np.float64), np.asarray(two[name], np.float64)
        if value.size:
            difference = np.abs(value - other).max() / max(1.0, np.abs(value).max())
            worst = max(worst, (float(difference), name))
    return worst


@functools.cache
def state_of(name, variant=None, scan=False):
    """Shapes of the parameters of a model, and of AdamW's state for them."""
    model = create_model(name, variant, **({"scan": True} if scan else {}))
    fixed = name.startswith("coltran") or name == "vitseg"
    inputs = example_inputs(model, find_model(name).image_size if fixed else (64, 64))
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    params = jax.eval_shape(model.init, keys, *inputs)["params"]
    return params, jax.eval_shape(optax.adamw(1e-3).init, params)


def shardings_of(state, mesh):
    """Where they lie by themselves."""
    params = parameter_shardings(state[0], mesh)
    return params, like_parameters(state[1], state[0], params, mesh)


def held(state, shardings):
    """Bytes that every device holds of such shapes."""
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
    )
