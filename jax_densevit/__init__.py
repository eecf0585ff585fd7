"""jax_densevit: transformers that predict every pixel, in JAX."""

__version__ = "0.1.0"


def load(path, **options):
    """A trained model with its preprocessing, from a workdir or a weight file: see :func:`jax_densevit.published.load`.

    loaded = jax_densevit.load("runs/quickstart")
    output = loaded.forward(*loaded.inputs(images))
    """
    from jax_densevit import published  # only now: it imports half the package

    return published.load(path, **options)
