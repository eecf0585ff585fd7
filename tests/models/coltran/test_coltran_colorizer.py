"""The colorizer: published sizes and costs, what may know what, and the pieces that a sampler takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_coltran import SIZE, colorizer, parameters, picture

from jax_densevit.errors import UserError
from jax_densevit.layers.axial_attention import ROW
from jax_densevit.layers.transformer import REMAT_POLICIES
from jax_densevit.models.coltran.conditional import UNCONDITIONED, ConditionalAttention, Conditioning
from jax_densevit.models.coltran.stack import ENCODER, INNER, OUTER, AxialStack, stack_macs
from jax_densevit.models.counts import count_parameters
from jax_densevit.models.registry import create_model, find_model

ADDITION = {"cond_mlp": "", "cond_ln": False, "cond_att_q": False, "cond_att_k": False, "cond_att_v": False}


@pytest.mark.parametrize(
    "variant,options,expected",
    [
        ("ColTran", {}, 46_310_400),
        ("ColTran-B", {}, 23_186_432),
        ("ColTran-S", {}, 46_156_032),
        ("ColTran", {"cond_ln": False}, 39_969_792),
        ("ColTran", {"cond_mlp": ""}, 42_109_952),
        ("ColTran", {f"cond_att_{name}": False for name in "qkv"}, 33_727_488),
    ],
)
def test_published_parameter_counts(variant, options, expected):
    model = create_model("coltran_colorizer", variant, **options)
    assert count_parameters(model, model.size) == expected


def test_published_costs():
    """GFLOP of one 64 x 64 picture, two a multiply-accumulate: the table of the original's parts."""
    sizes, conditioning = (512, 512, (64, 64)), create_model("coltran_colorizer").conditioning

    def giga(*arguments):
        return 2 * stack_macs(*arguments) / 1e9

    assert round(giga(4, ENCODER, *sizes)) == 107
    assert round(giga(2, OUTER, *sizes, 512, conditioning)) == 122
    assert round(giga(2, INNER, *sizes, 1024, conditioning)) == 96
    # The projections of conditions alone:
    for branches, context in ((OUTER, 512), (INNER, 1024)):
        plain = giga(2, branches, *sizes, 0, UNCONDITIONED)
        assert round(giga(2, branches, *sizes, context, conditioning) - plain) == 69
    # Both heads are 2 GFLOP each.
    total = 2 * find_model("coltran_colorizer").macs(create_model("coltran_colorizer"), (64, 64)) / 1e9
    assert round(total) == 330 and round(total - 2 * 2 * 4096 * 512 * 512 / 1e9) == 325


@pytest.mark.parametrize("options", [{}, {"cond_mlp": "shift", "cond_att_scale": False}])
def test_macs_are_those_the_compiler_counts(options):
    """The products, and some percent for all that is no product."""
    size = (8, 6)
    model = create_model(
        "coltran_colorizer", image_size=size, hidden_size=128, mlp_size=192, encoder_layers=2, **options
    )
    inputs = picture(1, size)
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    counted = jax.jit(model.apply).lower(variables, *inputs).cost_analysis()["flops"] / 2
    assert 1 < counted / find_model("coltran_colorizer").macs(model, size) < 1.04


@pytest.fixture(scope="module")
def outputs():
    """Logits of both heads `[25, 12, 512]`: nothing changed, then every symbol in turn, then every gray pixel."""
    model = colorizer()
    gray, symbols = picture(1)
    pixels = symbols.size

    def changes(picture, amount, top):
        flat = picture.ravel()
        return np.where(np.eye(pixels, dtype=bool), (flat + amount) % top, flat).reshape(pixels, *SIZE)

    symbols = np.concatenate([symbols, changes(symbols, 77, 512), symbols.repeat(pixels, 0)])
    gray = np.concatenate([gray.repeat(1 + pixels, 0), changes(gray, 99, 255)])
    output = jax.jit(model.apply)({"params": parameters(model)}, gray, symbols)
    return [np.asarray(logits).reshape(1 + 2 * pixels, pixels, 512) for logits in (output.logits, output.parallel)]


def test_strict_raster_causality(outputs):
    """Changing one pixel changes no logit there or before, bit for bit, and changes every later one."""
    logits = outputs[0]
    for pixel in range(logits.shape[1]):
        np.testing.assert_array_equal(logits[pixel + 1, : pixel + 1], logits[0, : pixel + 1])
        assert (np.abs(logits[pixel + 1, pixel + 1 :] - logits[0, pixel + 1 :]).max(-1) > 1e-4).all()


def test_colors_do_not_leak_into_the_gray_encoder(outputs):
    parallel = outputs[1]
    np.testing.assert_array_equal(parallel[1:13], parallel[:1].repeat(12, 0))


def test_every_gray_pixel_matters_to_every_logit(outputs):
    for logits in outputs:
        assert (np.abs(logits[13:] - logits[:1]).max(-1) > 1e-4).all()


@pytest.mark.parametrize(
    "options",
    [{}, ADDITION, {"skip": False, "cond_mlp": "shift", "cond_ln_seq": "cs", "cond_att_v": False}],
    ids=["full", "addition", "other"],
)
def test_pieces_of_a_sampler_equal_teacher_forcing(options):
    """Rows of the outer decoder, pixels of the inner one, and whole rows of it, with all that is kept between.

    Scanned, rows and columns being traced; norms pooled over the picture and, as published samples were made, by row.
    """
    # Two layers where everything is on; one shows the other conditionings.
    model = colorizer(**options, **({"outer_layers": 1, "inner_layers": 1} if options else {}))
    gray, symbols = picture(2)

    def whole(model, gray, symbols):
        z, e = model.encode(gray), model.embed(symbols)
        u = model.outer(e, z)
        return z, e, u, model.inner(e, u, z), model.inner(e, u, z, by_row=True)

    def pieces(model, z, e, by_row):
        batch = z.shape[0]
        outer_norms, inner_norms = model.outer_norms(z), model.inner_norms(z, by_row)

        def row(carry, index):
            u, cache = carry
            z_row, e_row = z[:, index], e[:, index]
            conditions, inputs = model.inner_conditions(u, z_row), model.inner_inputs(u, z_row, index)
            norms = jax.tree.map(lambda c: c[:, index if by_row else 0], inner_norms)
            at_once = model.inner_row(e_row, inputs, conditions, norms)
            left = jnp.pad(e_row, ((0, 0), (1, 0), (0, 0)))

            def pixel(kept, column):
                here = jax.tree.map(lambda c: c[:, column], conditions)
                hidden, kept = model.inner_step(inputs[:, column] + left[:, column], column, here, norms, kept)
                return kept, hidden

            _, hidden = jax.lax.scan(pixel, model.inner_cache(batch), jnp.arange(SIZE[1]))
            below, cache = model.outer_row(e_row, z_row, index, model.outer_conditions(z_row), outer_norms, cache)
            return (below, cache), (u, at_once, hidden.swapaxes(0, 1))

        start = (jnp.zeros_like(z[:, 0]), model.outer_cache(batch))
        _, rows = jax.lax.scan(row, start, jnp.arange(SIZE[0]))
        return [part.swapaxes(0, 1) for part in rows]

    def run(params, gray, symbols):
        bound = model.bind({"params": params})
        z, e, u, *hidden = whole(bound, gray, symbols)
        return u, hidden, [pieces(bound, z, e, by_row) for by_row in (False, True)]

    u, hidden, found = jax.jit(run)(parameters(model), gray, symbols)
    np.testing.assert_array_equal(u[:, 0], 0)
    assert (np.abs(u[:, 1:]).max(-1) > 0.01).all()
    for expected, (above, at_once, stepped) in zip(hidden, found, strict=True):
        np.testing.assert_allclose(above, u, atol=1e-5)
        np.testing.assert_allclose(at_once, expected, atol=1e-5)
        np.testing.assert_allclose(stepped, expected, atol=1e-5)
    # What the published sampler does is another model than the trained one, where norms are conditional.
    assert (np.abs(hidden[0] - hidden[1]).max() < 1e-6) == (not model.cond_ln)


def test_gradient_reaches_every_parameter():
    """Recomputing layers, and every policy recomputes what it says."""
    gray, symbols = picture(2)
    lowered = {}
    for policy in REMAT_POLICIES:
        model = colorizer(remat=policy, outer_layers=1, inner_layers=1)
        params = parameters(model)

        def loss(params, model=model):
            output = model.apply({"params": params}, gray, symbols, train=True)
            return jnp.square(output.logits).mean() + jnp.square(output.parallel).mean()

        lowered[policy] = jax.jit(jax.grad(loss)).lower(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(lowered["full"].compile()(params)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    flops = {policy: program.cost_analysis()["flops"] for policy, program in lowered.items()}
    assert flops["none"] < flops["dots"] < flops["dots_no_batch"] <= flops["full"]


def test_half_precision_computes_in_it_and_answers_in_float32(outputs):
    gray, symbols = picture(1)
    half = colorizer(dtype="bfloat16")
    params = parameters(half)
    output = jax.jit(half.apply)({"params": params}, gray, symbols)
    assert output.logits.dtype == output.parallel.dtype == jnp.float32
    z = jax.eval_shape(lambda p: half.apply({"params": p}, gray, method="encode"), params)
    assert z.dtype == jnp.bfloat16
    initial = jax.eval_shape(half.init, jax.random.key(0), gray, symbols)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    for found, exact in zip((output.logits, output.parallel), outputs, strict=True):
        assert 0 < np.abs(found.reshape(-1, 512) - exact[0]).max() < 0.15 * np.abs(exact[0]).max()


def test_dropout_in_training_alone(outputs):
    model = colorizer(dropout=0.5)
    params = {"params": parameters(model)}
    still, moved = jax.jit(
        lambda *inputs: (
            model.apply(params, *inputs).logits,
            model.apply(params, *inputs, train=True, rngs={"dropout": jax.random.key(0)}).logits,
        )
    )(*picture(1))
    np.testing.assert_allclose(still.reshape(-1, 512), outputs[0][0], atol=1e-5)
    assert np.abs(moved - still).max() > 0.01


def test_initial_numbers_are_those_of_keras():
    """Attention kernels count their fans with the model's width as a receptive field: eight times smaller numbers."""

    def limits(context):
        attention = ConditionalAttention(512, 4, 3, ROW, context=context, conditioning=Conditioning())
        params = attention.init(jax.random.key(0), jnp.zeros((1, 512)), {}, method="project")["params"]
        return {name: round(float(np.abs(leaf).max()), 4) for name, leaf in params.items()}

    outer, inner = limits(512), limits(1024)
    assert outer["q_kernel"] == inner["v_kernel"] == 0.0094
    assert outer["cond_q_kernel"] == 0.0067 and inner["cond_k_kernel"] == 0.0047
    assert outer["out_kernel"] == 0.0484 and outer["relative_bias"] == 0
    positions = AxialStack(0, ENCODER, 512, 512, 4, (3, 60)).init(jax.random.key(0), method="positions")["params"]
    assert round(float(positions["column_positions"].std()) * 512**0.5, 1) == 1.0


def test_no_parallel_head():
    model = colorizer(parallel_head=False)
    params = parameters(model)
    assert "parallel" not in params
    assert jax.eval_shape(model.apply, {"params": params}, *picture(1)).parallel is None


@pytest.mark.parametrize(
    "options,message",
    [
        ({"cond_mlp": "afine"}, "did you mean 'affine'"),
        ({"cond_ln_act": "gelu"}, "activation of conditions"),
        ({"cond_ln_seq": "ss"}, "cond_ln_seq"),
        ({"num_heads": 3}, "does not divide"),
        ({"remat": "ful"}, "did you mean 'full'"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(colorizer(**options).init, jax.random.key(0), *picture(1))


def test_refuses_pictures_of_another_size():
    with pytest.raises(UserError, match="made for pictures of 3 x 4.*got 4 x 4"):
        jax.eval_shape(colorizer().init, jax.random.key(0), *picture(1, (4, 4)))
