"""jax_densevit: transformers that predict every pixel, in JAX."""

import itertools
import signal
import sys

__version__ = "0.1.0"

if signal.getsignal(signal.SIGINT) == signal.default_int_handler and any(
    name.startswith("jax_densevit.") if flag == "-m" else "/densevit-" in name
    for flag, name in itertools.pairwise(sys.orig_argv[:4])
):
    # A command of ours is starting. Ctrl-C in the seconds of its imports ends it without a page of their traceback;
    # `console.run_command` puts Python's own way back.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def load(path, **options):
    """A trained model with its preprocessing, from a workdir or a weight file: see :func:`jax_densevit.published.load`.

    loaded = jax_densevit.load("runs/quickstart")
    output = loaded.forward(*loaded.inputs(images))
    """
    from jax_densevit import published  # only now: it imports half the package

    return published.load(path, **options)
