import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jax_densevit.errors import UserError
from jax_densevit.training.mesh import make_mesh
from jax_densevit.training.sharding import large_replicated, like_parameters, parameter_shardings

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
    assert found["encoder"]["qkv"]["kernel"] == P(None, None, ("fsdp", "tensor"))


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
        ([], "mesh.tensor is 2, but no entry of sharding_rules"),
    ],
)
def test_rules_that_cannot_work_are_refused(rules, message):
    with pytest.raises(UserError, match=message):
        specs(make_mesh(data=2, fsdp=2, tensor=2), rules)


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
