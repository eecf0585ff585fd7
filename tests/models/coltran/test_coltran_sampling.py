"""The sampler: what it draws from, that no short cut changes it, what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_coltran import SIZE, colorizer, parameters, picture

from jax_densevit.errors import UserError
from jax_densevit.models.coltran import sampling
from jax_densevit.models.coltran.sampling import choose, picture_keys, row_noise, sample_colors
from jax_densevit.models.coltran.stack import INNER, stack_macs
from jax_densevit.models.registry import create_model, find_model

BATCH = 4
SMALL = {"image_size": (4, 4), "hidden_size": 128, "mlp_size": 128, "encoder_layers": 2}
SCAN = jax.lax.scan
METHODS = ("cached", "jacobi", "naive")  # of the autoregressive distribution
EXAMPLES = np.array([5, 70_000, 3, 12])
ADDITION = {"cond_mlp": "", "cond_ln": False, "cond_att_q": False, "cond_att_k": False, "cond_att_v": False}


def keys(examples=EXAMPLES, seed=1, **options):
    return picture_keys(seed, examples, **options)


def noise_of(keys):
    return np.stack([row_noise(keys, row, SIZE[1]) for row in range(SIZE[0])], 1)


def trained(**options):
    """A model whose colors depend on each other as much as trained ones do: logits that outweigh the noise."""
    model = colorizer(**{"outer_layers": 1, **options})
    params = parameters(model)
    params["head"]["kernel"] *= 2
    return model, params


@functools.cache
def sampler(model, **options):
    """Compiled once for all tests."""
    return jax.jit(functools.partial(sample_colors, model, **options))


@pytest.fixture(scope="module")
def drawn():
    """The samples of four pictures by every method and with both statistics."""
    model, params = trained()
    gray, _ = picture(BATCH)
    return {
        (method, statistics): jax.tree.map(
            np.asarray, sampler(model, method=method, statistics=statistics)(params, gray, keys(), 1.0)
        )
        for method in METHODS
        for statistics in ("exact", "official")
    }


def test_draws_from_what_was_trained(drawn):
    """Teacher forcing on the sampled picture gives the very distributions that it was drawn from."""
    model, params = trained()
    gray, _ = picture(BATCH)
    forced = jax.jit(lambda symbols: model.apply({"params": params}, gray, symbols).logits)
    for method in METHODS:
        samples = drawn[method, "exact"]
        expected = forced(samples.symbols)
        np.testing.assert_allclose(jax.nn.softmax(samples.logits), jax.nn.softmax(expected), atol=1e-5)
        np.testing.assert_allclose(samples.logits, expected, atol=1e-4)
    assert np.ptp(expected, -1).min() > 3 and len(np.unique(samples.symbols)) > 12
    # The published statistics are of another distribution.
    official = drawn["cached", "official"]
    other = jax.nn.softmax(forced(official.symbols))
    assert np.abs(jax.nn.softmax(official.logits) - other).sum(-1).mean() > 0.2


@pytest.mark.parametrize("statistics", ["exact", "official"])
def test_methods_draw_the_same(drawn, statistics):
    naive, cached, jacobi = (drawn[method, statistics] for method in ("naive", "cached", "jacobi"))
    for other in (cached, jacobi):
        np.testing.assert_array_equal(other.symbols, naive.symbols)
        np.testing.assert_allclose(other.logits, naive.logits, atol=1e-4)
    assert (cached.passes == SIZE[1]).all() and (naive.passes == SIZE[1]).all()
    assert (jacobi.passes >= 1).all() and (jacobi.passes <= SIZE[1]).all()


def test_passes_are_counted(drawn):
    """One to confirm a right guess, two where colors depend on gray alone and the guess was wrong; more otherwise."""
    model, params = trained()
    gray, _ = picture(BATCH)
    run = sampler(model, method="jacobi", statistics="exact")
    assert drawn["jacobi", "exact"].passes.max() > 2
    params["head"] = jax.tree.map(np.zeros_like, params["head"])
    assert (run(params, gray, keys(), 1.0).passes == 2).all()
    params["parallel"] = jax.tree.map(np.zeros_like, params["parallel"])
    assert (run(params, gray, keys(), 1.0).passes == 1).all()


def test_official_statistics_are_a_row_fed_to_layers_of_pictures(drawn):
    """Every norm sees a picture all of whose rows are the row at hand. That is what the published sampler does by
    handing over one row: the weights of pooling are averaged over rows, the context over the row.
    """
    model, params = trained()
    gray, _ = picture(BATCH)

    @jax.jit
    def forced(symbols):
        bound = model.bind({"params": params})
        z, e = bound.encode(gray), bound.embed(symbols)
        u = bound.outer(e, z)
        x, context = jnp.pad(e, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1] + z + u, jnp.concatenate([z, u], -1)
        rows = [
            bound.inner_decoder(x, context, jnp.broadcast_to(z[:, row, None], z.shape))[:, row]
            for row in range(SIZE[0])
        ]
        return bound.logits(jnp.stack(rows, 1))

    for method in METHODS:
        samples = drawn[method, "official"]
        logits = np.asarray(forced(samples.symbols))
        np.testing.assert_allclose(samples.logits, logits, atol=1e-4)
        np.testing.assert_array_equal(samples.symbols, (logits + noise_of(keys())).argmax(-1))


@pytest.mark.parametrize("method", ["cached", "jacobi"])
def test_a_picture_does_not_depend_on_its_batch(drawn, method):
    model, params = trained()
    gray, _ = picture(BATCH)
    for i in range(BATCH):
        alone = sampler(model, method=method)(params, gray[i : i + 1], keys(EXAMPLES[i : i + 1]), 1.0)
        np.testing.assert_array_equal(alone.symbols[0], drawn[method, "exact"].symbols[i])
        np.testing.assert_array_equal(alone.passes[0], drawn[method, "exact"].passes[i])


@pytest.mark.parametrize("method", ["cached", "jacobi"])
def test_a_picture_does_not_depend_on_devices(drawn, method):
    """Pictures spread over four devices, of which each runs its rows until the last of all pictures is done."""
    model, params = trained()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spread, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    gray, ids = jax.device_put((picture(BATCH)[0], keys()), spread)
    found = sampler(model, method=method, statistics="exact")(jax.device_put(params, whole), gray, ids, 1.0)
    assert len(found.symbols.sharding.device_set) == 4
    np.testing.assert_array_equal(found.symbols, drawn[method, "exact"].symbols)
    np.testing.assert_array_equal(found.passes, drawn[method, "exact"].passes)


def test_samples_of_one_picture(drawn):
    """The first is that of a single draw, the others differ, and all are as if drawn for themselves."""
    model, params = trained()
    gray = picture(BATCH)[0][:2]
    both = keys(EXAMPLES[:2], samples=2)
    run = sampler(model, method="cached", statistics="exact")
    several = run(params, gray, both, 1.0)
    assert several.symbols.shape == (2, 2, *SIZE) and several.passes.shape == (2, 2, SIZE[0])
    np.testing.assert_array_equal(several.symbols[:, 0], drawn["cached", "exact"].symbols[:2])
    assert (several.symbols[:, 0] != several.symbols[:, 1]).mean() > 0.5
    apart = run(params, gray.repeat(2, 0), both.reshape(-1), 1.0)
    np.testing.assert_array_equal(several.symbols.reshape(4, *SIZE), apart.symbols)


def test_strict_order_of_drawing(monkeypatch):
    """Other noise at one pixel changes no distribution there or before, and those of all later pixels."""
    model, params = trained()
    gray, _ = picture(1)

    @jax.jit
    def logits(changed):
        def noise(keys, row, width):
            here = jnp.arange(width) + row * width == changed
            return row_noise(keys, row, width) + 1e4 * here[:, None] * jax.nn.one_hot(7, 512)

        monkeypatch.setattr(sampling, "row_noise", noise)
        return sample_colors(model, params, gray, keys(EXAMPLES[:1])).logits[0].reshape(-1, 512)

    plain = np.asarray(logits(-1))
    for pixel in range(SIZE[0] * SIZE[1]):
        found = np.asarray(logits(pixel))
        np.testing.assert_array_equal(found[: pixel + 1], plain[: pixel + 1])
        assert (np.abs(found - plain)[pixel + 1 :].max(-1) > 1e-4).all()


def test_noise_is_that_of_seed_example_and_pixel():
    noise = noise_of(keys())
    assert len(np.unique(noise[..., 0])) == noise[..., 0].size and noise.shape == (BATCH, *SIZE, 512)
    np.testing.assert_array_equal(row_noise(keys(EXAMPLES[2:3]), 1, SIZE[1])[0], noise[2, 1])
    assert (row_noise(keys(seed=2), 0, SIZE[1]) != noise[:, 0]).mean() > 0.99
    few, many = keys(samples=2), keys(samples=3)
    assert (jax.random.key_data(few) == jax.random.key_data(many[:, :2])).all()
    # Gumbel: mean is Euler's constant, variance pi^2 / 6.
    assert abs(noise.mean() - 0.5772) < 0.03 and abs(noise.var() - np.pi**2 / 6) < 0.06


def test_chosen_symbols_have_the_distribution_of_their_logits():
    logits = jnp.array([1.0, 0.0, -1.0, 0.5, 3.0])
    noise = jax.random.gumbel(jax.random.key(0), (40_000, 5))

    def frequencies(*options):
        return np.bincount(choose(jnp.broadcast_to(logits, noise.shape), noise, *options), minlength=5) / 40_000

    np.testing.assert_allclose(frequencies(1.0), jax.nn.softmax(logits), atol=0.01)
    np.testing.assert_allclose(frequencies(2.0), jax.nn.softmax(logits / 2), atol=0.01)
    np.testing.assert_array_equal(frequencies(0.0), [0, 0, 0, 0, 1])
    best = jnp.where(jnp.array([1, 0, 0, 0, 1]), logits, -jnp.inf)
    np.testing.assert_allclose(frequencies(2.0, 2), jax.nn.softmax(best / 2), atol=0.01)


def test_temperature_and_top_k_of_pictures():
    model, params = trained()
    gray, _ = picture(BATCH)
    run = sampler(model, method="cached", statistics="exact")
    best = run(params, gray, keys(), 0.0)
    np.testing.assert_array_equal(best.symbols, best.logits.argmax(-1))
    np.testing.assert_array_equal(run(params, gray, keys(seed=9), 0.0).symbols, best.symbols)
    passes = sampler(model, method="jacobi", statistics="exact")(params, gray, keys(), 0.0)
    np.testing.assert_array_equal(passes.symbols, best.symbols)
    few = jax.tree.map(np.asarray, sampler(model, top_k=3)(params, gray, keys(), 5.0))
    rank = (few.logits > np.take_along_axis(few.logits, few.symbols[..., None], -1)).sum(-1)
    assert set(np.unique(rank)) == {0, 1, 2}


def test_parallel_draws_every_pixel_by_itself_from_the_second_head():
    model, params = trained()
    gray, symbols = picture(BATCH)
    run = sampler(model, method="parallel")
    found = run(params, gray[:2], keys(EXAMPLES[:2], samples=2), 1.0)
    logits = np.asarray(jax.jit(model.apply)({"params": params}, gray, symbols).parallel)
    np.testing.assert_allclose(found.logits, logits[:2, None].repeat(2, 1), atol=1e-5)
    np.testing.assert_array_equal(found.symbols[:, 0], (logits + noise_of(keys())).argmax(-1)[:2])
    assert (found.passes == 1).all() and (found.symbols[:, 0] != found.symbols[:, 1]).mean() > 0.5
    np.testing.assert_array_equal(run(params, gray, keys(), 0.0).symbols, logits.argmax(-1))
    with pytest.raises(UserError, match="needs the second head"):
        sample_colors(colorizer(parallel_head=False), {}, gray, keys(), method="parallel")


@pytest.mark.parametrize(
    "method,options",
    [("cached", ADDITION), ("jacobi", {"parallel_head": False, "skip": False})],
    ids=["addition", "no skip"],
)
def test_other_models(method, options):
    model, params = trained(**options, inner_layers=1)
    gray, _ = picture(BATCH)
    found = sampler(model, method=method)(params, gray, keys(), 1.0)
    logits = np.asarray(jax.jit(model.apply)({"params": params}, gray, found.symbols).logits)
    np.testing.assert_allclose(found.logits, logits, atol=1e-4)
    np.testing.assert_array_equal(found.symbols, (logits + noise_of(keys())).argmax(-1))


def flops_of(model, monkeypatch, passes=1, samples=1, **options):
    """FLOPs of the sampler's program for one picture as the compiler counts them, all loops unrolled."""
    gray, symbols = picture(1, model.size)
    variables = jax.eval_shape(model.init, jax.random.key(0), gray, symbols)
    monkeypatch.setattr(jax.lax, "scan", functools.partial(SCAN, unroll=True))
    monkeypatch.setattr(
        jax.lax, "while_loop", lambda _, body, state: functools.reduce(lambda x, _: body(x), [None] * passes, state)
    )
    run = jax.jit(functools.partial(sample_colors, model, **options))
    lowered = run.lower(variables["params"], gray, keys(EXAMPLES[:1], samples=samples))
    return lowered.cost_analysis()["flops"]


def expected_flops(model):
    """(one pass of the whole model without its second head, another pass of the inner decoder over all rows)."""
    size, width = model.size, model.hidden_size
    head = size[0] * size[1] * width * 512
    whole = find_model("coltran_colorizer").macs(model, size) - head
    inner = stack_macs(model.inner_layers, INNER, width, model.mlp_size, size)  # conditions are there already
    return 2 * whole, 2 * (inner + head)


def test_cost_is_that_of_one_pass(monkeypatch):
    """As the compiler counts it: every layer once for every pixel, and the second head not."""
    model = create_model("coltran_colorizer", **SMALL)
    single = flops_of(model, monkeypatch)
    assert 1 < single / expected_flops(model)[0] < 1.1
    # A second sample shares the gray picture's part.
    assert 1.3 < flops_of(model, monkeypatch, samples=2) / single < 1.7


def test_cost_of_more_passes(monkeypatch):
    """A pass of "jacobi" is one of the inner decoder with its conditions kept: the original's table of costs."""
    model = create_model("coltran_colorizer", **SMALL)
    one, three = (flops_of(model, monkeypatch, passes, method="jacobi") for passes in (1, 3))
    whole, another = expected_flops(model)
    assert 1 < (three - one) / 2 / another < 1.1 and one > whole
    whole, another = expected_flops(create_model("coltran_colorizer"))
    assert whole == pytest.approx(0.33e12, rel=0.02)
    for passes, tera in ((4, 0.41), (8, 0.53), (16, 0.76), (64, 2.2)):
        assert whole + (passes - 1) * another == pytest.approx(tera * 1e12, rel=0.03)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"method": "cache"}, "did you mean 'cached'"),
        ({"statistics": "oficial"}, "did you mean 'official'"),
        ({"top_k": 0}, "top_k=0 is not one of 1..512"),
        ({"temperature": -1.0}, "temperature=-1.0 is negative"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        sample_colors(colorizer(), {}, *picture(1)[:1], keys(EXAMPLES[:1]), **options)


def test_refuses_pictures_of_another_size():
    model = colorizer()
    gray, _ = picture(1, (4, 4))
    with pytest.raises(UserError, match="made for pictures of 3 x 4"):
        jax.eval_shape(functools.partial(sample_colors, model), parameters(model), gray, keys(EXAMPLES[:1]))
