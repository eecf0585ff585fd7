import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jax_densevit.errors import UserError
from jax_densevit.training.mesh import make_mesh
from jax_densevit.training.paths import named_leaves
from jax_densevit.training.sharding import gather, large_replicated, like_parameters, parameter_shardings

SHAPES = {
    "encoder": {"mlp": {"kernel": (64, 256), "bias": (256,)}, "qkv": {"kernel": (3, 64, 64)}},
    "head": {"kernel": (63, 31)},
}


def shapes(tree=SHAPES, dtype=jnp.float32):
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), tree, is_leaf=lambda x: isinstance(x, tuple))


def specs(mesh, rules=(), minimum_bytes=4096):
    return jax.tree.map(lambda s: s.spec, parameter_shardings(shapes(), mesh, rules, minimum_bytes))


def test_fsdp_divides_the_largest_dimension_that_can_be_divided():
    found = specs(make_mesh(fsdp=4))
    assert found["encoder"]["mlp"]["kernel"] == P(None, "fsdp")
    assert found["encoder"]["qkv"]["kernel"] == P(None, "fsdp")  # the first of two equal ones
    assert found["encoder"]["mlp"]["bias"] == P()  # too small
    assert found["head"]["kernel"] == P()  # nothing divisible


def test_the_threshold_is_in_bytes_and_inclusive():
    mesh = make_mesh(data=1, fsdp=8)
    assert specs(mesh, minimum_bytes=4 * 64 * 256)["encoder"]["mlp"]["kernel"] == P(None, "fsdp")
    assert specs(mesh, minimum_bytes=4 * 64 * 256 + 1)["encoder"]["mlp"]["kernel"] == P()
    assert specs(mesh, minimum_bytes=0)["encoder"]["mlp"]["bias"] == P("fsdp")


def test_without_an_fsdp_axis_everything_is_copied():
    assert set(jax.tree.leaves(specs(make_mesh()), is_leaf=lambda x: isinstance(x, P))) == {P()}


def test_rules_go_first_and_fsdp_takes_a_dimension_that_they_leave():
    rules = [
        ("mlp/kernel", (None, "tensor")),
        ("mlp/bias", ("tensor",)),
        ("qkv", (None, None, ("fsdp", "tensor"))),
    ]
    found = specs(make_mesh(data=2, fsdp=2, tensor=2), rules)
    assert found["encoder"]["mlp"]["kernel"] == P("fsdp", "tensor")
    assert found["encoder"]["mlp"]["bias"] == P("tensor")
    assert found["encoder"]["qkv"]["kernel"] == P(None, None, ("tensor", "fsdp"))


def test_a_rule_without_axes_keeps_whole_copies():
    assert specs(make_mesh(fsdp=4), [("mlp/kernel", ())])["encoder"]["mlp"]["kernel"] == P()


@pytest.mark.parametrize(
    "rules, message",
    [
        ([("decoder", ("tensor",))], "'decoder' matches no parameter"),
        ([("kernel", ()), ("head/kernel", ("tensor",))], "'head/kernel' never decides"),
        ([("head", ("tensor", None))], r"63 of head/kernel \(63, 31\) into 2 parts"),
        ([("bias", (None, "tensor"))], r"gives 2 dimensions, but encoder/mlp/bias has shape \(256,\)"),
        ([("bias", ("tensr",))], "mesh axis 'tensr'; did you mean 'tensor'"),
        ([("mlp/kernel", ("tensor", "tensor"))], "names the mesh axis 'tensor' twice"),
        ([("bias", "tensor")], "needs one entry per dimension"),
    ],
)
def test_rules_that_cannot_work_are_refused(rules, message):
    with pytest.raises(UserError, match=message):
        specs(make_mesh(data=2, fsdp=2, tensor=2), rules)


LAYERS = {
    "encoder": {
        "block_0": {"attention": {"qkv": {"kernel": (8, 3, 4, 2), "bias": (3, 4, 2)}, "out": {"kernel": (4, 2, 8)}}},
        "blocks_1_3": {"mlp": {"fc1": {"kernel": (2, 8, 32), "bias": (2, 32)}, "fc2": {"kernel": (2, 32, 8)}}},
    },
    "first": {"conv": {"kernel": (3, 3, 4, 6)}, "norm": {"scale": (6,)}},
    "second": {"conv": {"kernel": (3, 3, 6, 4)}, "norm": {"scale": (4,)}},
    "head": {"kernel": (8, 7)},
}


def found_by_name(mesh, rules=(), minimum_bytes=2**30):
    return {
        path: sharding.spec
        for path, sharding in named_leaves(parameter_shardings(shapes(LAYERS), mesh, rules, minimum_bytes)).items()
    }


def test_heads_hidden_channels_and_pairs_of_convolutions_go_over_tensor_by_themselves():
    found = found_by_name(make_mesh(data=4, tensor=2))
    block, stack = "encoder/block_0/attention", "encoder/blocks_1_3/mlp"
    assert found == {
        f"{block}/qkv/kernel": P(None, None, "tensor"),
        f"{block}/qkv/bias": P(None, "tensor"),
        f"{block}/out/kernel": P("tensor"),
        # The axis that stacks scanned layers comes first, and is not counted.
        f"{stack}/fc1/kernel": P(None, None, "tensor"),
        f"{stack}/fc1/bias": P(None, "tensor"),
        f"{stack}/fc2/kernel": P(None, "tensor"),
        "first/conv/kernel": P(None, None, None, "tensor"),
        "first/norm/scale": P("tensor"),
        "second/conv/kernel": P(None, None, "tensor"),
        "second/norm/scale": P(),
        "head/kernel": P(),
    }


def test_what_the_axis_does_not_divide_stays_whole_or_goes_to_fsdp():
    found = found_by_name(make_mesh(data=1, fsdp=2, tensor=4), minimum_bytes=0)
    assert found["encoder/block_0/attention/qkv/kernel"] == P("fsdp", None, "tensor")
    assert found["first/conv/kernel"] == P(None, None, None, "fsdp")  # 6 channels are no multiple of 4
    assert found["first/norm/scale"] == P("fsdp")
    assert found["encoder/blocks_1_3/mlp/fc1/kernel"] == P(None, "fsdp", "tensor")  # never the axis of layers
    with pytest.raises(UserError, match="mesh.tensor is 8, but nothing of this model is divided over it"):
        parameter_shardings(shapes({"qkv": {"kernel": (8, 3, 4, 2)}}), make_mesh(data=1, tensor=8))


def test_what_no_rule_divides_is_stored_over_both_axes_and_gathered_from_both():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    tree = shapes({"token": (1, 64), "odd": (63, 34), "mlp": {"fc1": {"kernel": (32, 64), "bias": (64,)}}})
    places = parameter_shardings(tree, mesh, minimum_bytes=0)
    assert {name: place.spec for name, place in named_leaves(places).items()} == {
        "token": P(None, ("fsdp", "tensor")),
        "odd": P(None, "fsdp"),  # 34 is no multiple of 4
        "mlp/fc1/kernel": P("fsdp", "tensor"),
        "mlp/fc1/bias": P(("tensor", "fsdp")),
    }
    params = jax.device_put(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), tree), places)
    used = named_leaves(jax.jit(lambda params: gather(params, places))(params))
    assert {name: leaf.sharding.spec for name, leaf in used.items() if not leaf.is_fully_replicated} == {
        "mlp/fc1/kernel": P(None, "tensor"),
        "mlp/fc1/bias": P("tensor"),
    }


def test_vectors_that_tensor_divides_are_divided_further():
    found = found_by_name(make_mesh(data=2, fsdp=2, tensor=2), minimum_bytes=0)
    assert found["encoder/blocks_1_3/mlp/fc1/bias"] == P(None, ("tensor", "fsdp"))
    assert found["first/norm/scale"] == P("tensor")  # 6 channels are no multiple of 4


def test_rules_of_the_config_go_before_those_of_the_layers():
    rules = [("fc1/kernel", ("tensor",)), ("attention", ())]
    found = found_by_name(make_mesh(data=4, tensor=2), rules)
    assert found["encoder/blocks_1_3/mlp/fc1/kernel"] == P(None, "tensor")  # a layer's first dimension
    assert found["encoder/blocks_1_3/mlp/fc2/kernel"] == P(None, "tensor")
    assert found["encoder/block_0/attention/qkv/kernel"] == P()
    with pytest.raises(UserError, match=r"gives 3 dimensions, but encoder/blocks_1_3/mlp/fc1/kernel has shape \(8, 32"):
        found_by_name(make_mesh(data=4, tensor=2), [("fc1/kernel", (None, None, "tensor"))])


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_what_is_left_whole_is_little_beside_a_share(parts):
    """Whatever the sizes: a sixtieth of everything is little for two devices and much for eight."""
    sizes = {"large": (1024, 64), "middle": (64, 16), "small": (8,), "never": (7,)}
    params = shapes({name: {"kernel": size} for name, size in sizes.items()})
    found = parameter_shardings(params, make_mesh(data=1, fsdp=parts, devices=jax.devices()[:parts]))
    held = sum(
        4 * math.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True)
    )
    total = sum(4 * math.prod(size) for size in sizes.values())
    assert total / parts < held < 1.08 * total / parts
    divided = {name.partition("/")[0] for name, one in named_leaves(found).items() if not one.is_fully_replicated}
    assert divided == ({"large"} if parts < 8 else {"large", "middle"})


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-3),
        optax.sgd(1e-3, momentum=0.9),
        optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_rms()),
        optax.partition(
            {"a": optax.adam(1e-3), "b": optax.set_to_zero()}, {"encoder": "a", "head": "b"}
        ),
    ],
    ids=["adamw", "sgd", "rms", "partition"],
)  # fmt: skip
def test_moments_lie_where_their_parameters_lie(optimizer):
    mesh = make_mesh(fsdp=4)
    params = shapes()
    shardings = parameter_shardings(params, mesh, minimum_bytes=0)
    state = jax.eval_shape(optimizer.init, params)
    found = like_parameters(state, params, shardings, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    divided = {
        jax.tree_util.keystr(path): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(found)
        if not sharding.is_fully_replicated
    }
    moments = [path for path in divided if path.endswith("['mlp']['kernel']")]
    assert moments and all(divided[path] == P(None, "fsdp") for path in moments)
    # Everything with a parameter's shape is divided; counters are not.
    expected = {leaf.shape for leaf in jax.tree.leaves(params)} - {(63, 31)}
    count = sum(leaf.shape in expected for leaf in jax.tree.leaves(state))
    assert len(divided) == count > 0


def test_large_copies_are_reported_where_the_mesh_could_divide_them():
    params = shapes()
    mesh = make_mesh(fsdp=4)
    shardings = parameter_shardings(params, mesh, minimum_bytes=4096)
    assert large_replicated(params, shardings, 4096) == {"head/kernel": 63 * 31 * 4}
    assert large_replicated(params, shardings, 10_000) == {}
    assert large_replicated(params, parameter_shardings(params, make_mesh()), 0) == {}
