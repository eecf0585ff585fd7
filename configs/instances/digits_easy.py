"""Scattered digits that never overlap: each a mask and a class, by queries among the patches of a transformer.

Command:   python -m jax_densevit.train --config=configs/instances/digits_easy.py:small --workdir=runs/digits_easy
           with MNIST's digits instead of scikit-learn's: --config.data.train.mnist=FOLDER_OF_IDX_FILES
Words:     embedding (default: the mask is a query's product with every pixel), token (a linear layer gives it), box (a
           box and the mask in it), published (the report's model and training: token, Adam 1e-4, Dice and classes),
           small (width 128, 3,000 steps), quick (steps of a second, learns nothing)
Hardware:  a GPU; small: two CPU cores, 2 GB of memory
Expected:  the report: 97 % of the digits classified right, Dice loss 0.03, after 11,256 steps of 64 scenes
Run here:  only `quick`.
"""

from jax_densevit.configuration import sibling

recipe = sibling(__file__, "recipe.py")


def get_config(arg=""):
    """The config of one form."""
    return recipe.scenes(arg, overlap="none")
