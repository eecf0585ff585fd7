"""Where parameters and optimizer states live on the mesh.

Automatic FSDP: tensors are divided over "fsdp" along their largest dimension that can be, the largest tensors first,
until what every device still holds whole is small beside its share: small tensors cost more to gather than they save.
Rules go first, those of the config and then those of the layers that models are made of (tensor parallelism), and leave
the dimensions that they do not name to FSDP. What they leave alone altogether FSDP divides over "tensor" as well.

A dimension's axes are in an order: those from "fsdp" on are storage, and gathered before a model computes; those before
it divide the work.

Rules know layers, not stacks of them: where layers are scanned, the axis that counts them is not a dimension of a rule.
"""

import contextlib
import functools
import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_densevit.errors import UserError, did_you_mean
from jax_densevit.layers.placement import layers_made_whole_by
from jax_densevit.models.tensor_parallel import tensor_dimension
from jax_densevit.training.mesh import AXES, replicated
from jax_densevit.training.paths import first_match, named_leaves, path_name

LARGE = 4 * 2**20  # bytes from which a tensor that nobody could divide is reported
COPIES = 0.08  # what a device may hold whole, of its share of all parameters
STACKED_LAYERS = re.compile(r"(^|/)blocks_\d+_\d+/")  # what `layers.transformer.Encoder` scans over

# (regular expression over "a/b/c", one entry per dimension: an axis name, a tuple of names, or None)
Rule = tuple[str, Sequence[str | Sequence[str] | None]]


def size_in_bytes(array: Any) -> int:
    """Bytes of an array, or of the array that a `ShapeDtypeStruct` stands for."""
    return math.prod(array.shape) * array.dtype.itemsize


def parameter_shardings(params: Any, mesh: Mesh, rules: Sequence[Rule] = (), minimum_bytes: int | None = None) -> Any:
    """A tree like `params` with the sharding of every parameter.

    Args:
      params: parameters, or their shapes (`jax.eval_shape`).
      mesh: from `make_mesh`.
      rules: `(pattern, axes per dimension)`; the first pattern found in a parameter's path decides. Dimensions given as
        None stay free for FSDP, unless the rule names no axis at all: such a parameter is copied to every device.
        Parameters that none of them matches follow `models.tensor_parallel.RULES`, as far as their sizes allow.
      minimum_bytes: tensors of at least this size are divided over "fsdp"; None leaves as many of the smallest whole as
        `COPIES` allows, so that what a device holds falls as one over the size of the axis.

    Raises:
      UserError: a rule that matches nothing, names an unknown axis, names one axis twice, has more entries than the
        parameter has dimensions, or divides a dimension that cannot be divided; a "tensor" axis that divides nothing.
    """
    rules = [(pattern, _normal(pattern, axes)) for pattern, axes in rules]
    leaves = named_leaves(params)
    decided = first_match([pattern for pattern, _ in rules], leaves, "sharding_rules")
    parts, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    divided: dict[str, list[tuple[str, ...]]] = {}  # axis names per dimension
    free: dict[str, tuple[int, tuple[str, ...]]] = {}  # the dimension that FSDP may take, and over which axes
    for name, leaf in leaves.items():
        layers = 1 if STACKED_LAYERS.search(name) else 0
        shape = leaf.shape[layers:]
        axes: list[tuple[str, ...]] = [()] * len(shape)
        automatic = parts > 1
        if name in decided:
            pattern, given = rules[decided[name]]
            axes = _ruled(pattern, given, name, shape, mesh)
            automatic = automatic and any(given) and not any("fsdp" in names for names in given)
        elif tensor > 1:
            dimension = tensor_dimension(name, shape)
            if dimension is not None and shape[dimension] % tensor == 0:
                axes[dimension] = ("tensor",)
        divided[name] = [()] * layers + axes
        if not automatic:
            continue
        possible = [d for d in range(len(shape)) if not axes[d] and shape[d] % parts == 0]
        both = [d for d in possible if shape[d] % (parts * tensor) == 0] if tensor > 1 and not any(axes) else []
        # Where nothing else is left (vectors, depthwise kernels), the parts that "tensor" makes are divided further.
        possible = possible or [
            d for d in range(len(shape)) if axes[d] and shape[d] % (parts * _parts(axes[d], mesh)) == 0
        ]
        if possible:
            dimension = layers + max(both or possible, key=lambda d, shape=shape: shape[d])
            free[name] = (dimension, ("fsdp", "tensor") if both else ("fsdp",))
    if tensor > 1 and not any("tensor" in names for axes in divided.values() for names in axes):
        raise UserError(
            f"mesh.tensor is {tensor}, but nothing of this model is divided over it, so its devices would repeat each "
            "other's work: none of its heads and hidden sizes can be, and no entry of sharding_rules says another "
            "dimension. Choose another size, add a rule, or set mesh.tensor to 1."
        )
    if minimum_bytes is None:
        sizes = {
            name: size_in_bytes(leaf) // math.prod(_parts(names, mesh) for names in divided[name])
            for name, leaf in leaves.items()
        }
        taken = _worth_dividing(sizes, free, COPIES * sum(map(size_in_bytes, leaves.values())) / (parts * tensor))
    else:
        taken = {name for name in free if size_in_bytes(leaves[name]) >= minimum_bytes}
    for name in taken:
        dimension, axes = free[name]
        divided[name][dimension] += axes
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, _spec(divided[path_name(path)])), params
    )


def _worth_dividing(sizes: dict[str, int], free: Collection[str], budget: float) -> set[str]:
    """All of `free` but the smallest, which with what cannot be divided have at most so many bytes."""
    whole = sum(size for name, size in sizes.items() if name not in free)
    names = sorted(free, key=lambda name: sizes[name])
    while names and whole + sizes[names[0]] <= budget:
        whole += sizes[names.pop(0)]
    return set(names)


def _ruled(
    pattern: str, given: list[tuple[str, ...]], name: str, shape: tuple[int, ...], mesh: Mesh
) -> list[tuple[str, ...]]:
    """What a rule of the config says of a parameter: axis names per dimension."""
    if len(given) > len(shape):
        raise UserError(f"sharding_rules: {pattern!r} gives {len(given)} dimensions, but {name} has shape {shape}.")
    axes = [*given, *[()] * (len(shape) - len(given))]
    for size, names in zip(shape, axes, strict=True):
        if size % _parts(names, mesh):
            raise UserError(
                f"sharding_rules: {pattern!r} divides a dimension of {size} of {name} {shape} into "
                f"{_parts(names, mesh)} parts over {names}; choose another dimension or axis size."
            )
    return axes


def _parts(names: tuple[str, ...], mesh: Mesh) -> int:
    """Into how many parts these axes divide a dimension."""
    return math.prod(mesh.shape[axis] for axis in names)


def _spec(axes: Sequence[tuple[str, ...]]) -> PartitionSpec:
    """The partition spec of a tuple of axis names per dimension, in its shortest form."""
    entries = [names[0] if len(names) == 1 else names or None for names in axes]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _normal(pattern: str, axes: Sequence[str | Sequence[str] | None]) -> list[tuple[str, ...]]:
    """A rule's axes as a list of tuples of axis names."""
    if isinstance(axes, str):
        raise UserError(f"sharding_rules: {pattern!r} needs one entry per dimension, such as (None, {axes!r}).")
    given = [() if axis is None else (axis,) if isinstance(axis, str) else tuple(axis) for axis in axes]
    named = [name for names in given for name in names]
    for name in named:
        if name not in AXES:
            raise UserError(f"sharding_rules: {pattern!r} names the mesh axis {name!r}{did_you_mean(name, AXES)}")
        if named.count(name) > 1:
            raise UserError(f"sharding_rules: {pattern!r} names the mesh axis {name!r} twice.")
    return [tuple(sorted(names, key="fsdp".__eq__)) for names in given]  # what a rule divides otherwise is work


def gather(params: Any, shardings: Any) -> Any:
    """Parameters as a model should compute with them: whole but for what "tensor" divides of the work. Inside `jit`.

    Without this the compiler lets activations inherit the division of the parameters, and every device ends up with the
    activations of the whole batch. What comes back as gradient is to be constrained to `shardings` again.

    Args:
      params: parameters divided as `shardings` says.
      shardings: from `parameter_shardings`.
    """
    return jax.lax.with_sharding_constraint(params, jax.tree.map(_whole, shardings))


@contextlib.contextmanager
def gathered(params: Any, shardings: Any) -> Iterator[Any]:
    """The same for a model that is traced within it, with stacked layers in pieces: each is gathered where it is used.

    A device then never holds more than one layer of them whole, and their gradients are divided layer by layer.
    """
    named, places = named_leaves(params), dict(zip(named_leaves(params), jax.tree.leaves(shardings), strict=True))
    stacked = {name for name in named if STACKED_LAYERS.search(name)}

    def place(path, leaf):
        name = path_name(path)
        return leaf if name in stacked else jax.lax.with_sharding_constraint(leaf, _whole(places[name]))

    def make_whole(path, layer):
        def one(key, leaf):
            name = "/".join((*path, path_name(key)))
            return _gather_one(leaf, _layer_of(places[name])) if name in stacked else leaf

        return jax.tree_util.tree_map_with_path(one, layer)

    with layers_made_whole_by(make_whole):
        yield jax.tree_util.tree_map_with_path(place, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_one(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, _whole(sharding))


def _gather_one_forward(leaf, sharding):
    return _gather_one(leaf, sharding), None


def _gather_one_backward(sharding, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, sharding),)


_gather_one.defvjp(_gather_one_forward, _gather_one_backward)


def _layer_of(sharding: NamedSharding) -> NamedSharding:
    """Where one layer lies of layers that are stacked on the first axis."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _whole(sharding: NamedSharding) -> NamedSharding:
    axes = [(axis,) if isinstance(axis, str) else axis or () for axis in sharding.spec]
    work = [names[: names.index("fsdp")] if "fsdp" in names else names for names in axes]
    return NamedSharding(sharding.mesh, _spec(work))


def like_parameters(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that contains copies of the parameter tree: an optimizer's state.

    A leaf belongs to the parameter whose path ends its own path and whose shape it has: `[0].trace['head']['kernel']`
    to `head/kernel`. What belongs to no parameter (counters) is copied to every device.
    """
    known = {
        name: (leaf.shape, sharding)
        for (name, leaf), sharding in zip(named_leaves(params).items(), jax.tree.leaves(shardings), strict=True)
    }

    def sharding(path, leaf) -> NamedSharding:
        keys = []
        for key in reversed(path):
            if not isinstance(key, jax.tree_util.DictKey):
                break
            keys.insert(0, key)
        shape, found = known.get(path_name(keys), (None, None))
        return found if shape == leaf.shape else replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def large_replicated(params: Any, shardings: Any, minimum_bytes: int = LARGE) -> dict[str, int]:
    """Bytes by path of the large parameters that every device holds whole although the mesh could divide them.

    Empty where the mesh has neither an "fsdp" nor a "tensor" axis: copies are then what was asked for.
    """
    found = {}
    for (name, leaf), sharding in zip(named_leaves(params).items(), jax.tree.leaves(shardings), strict=True):
        divisible = sharding.mesh.shape["fsdp"] * sharding.mesh.shape["tensor"] > 1
        if divisible and sharding.is_fully_replicated and size_in_bytes(leaf) >= minimum_bytes:
            found[name] = size_in_bytes(leaf)
    return found
