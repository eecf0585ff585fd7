"""Scattered digits that never overlap: each a mask and a class, by queries among the patches of a transformer.

Command:   python -m jax_densevit.train --config=configs/instances/digits_easy.py:small --workdir=runs/digits_easy
           with MNIST's digits instead of scikit-learn's: --config.data.train.mnist=FOLDER_OF_IDX_FILES
Words:     embedding (default: the mask is a query's product with every pixel), token (a linear layer gives it), box (a
           box and the mask in it), unet (a Hungarian U-Net instead of the transformer: a query is an output channel),
           published (the report's model and training: token, Adam 1e-4, Dice and classes), small (width 128, 3,000
           steps of 64; unet: base 16, 1,500 steps of 32), quick (steps of a second, learns nothing)
Hardware:  a GPU; small: two CPU cores, 2 GB of memory
Expected:  the report: 97 % of the digits classified right, Dice loss 0.03, after 11,256 steps of 64 scenes
Run here:  `small` and `unet,small` with MNIST's digits: 82 and 97 % right, see docs/studies/objects.md
"""

from jax_densevit.configuration import sibling

recipe = sibling(__file__, "recipe.py")


def get_config(arg=""):
    """The config of one form."""
    return recipe.scenes(arg, overlap="none")
