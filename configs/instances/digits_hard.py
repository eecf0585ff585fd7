"""Scattered digits that may overlap, learned and scored whole: what one digit hides of another is part of its mask.

Command:   python -m jax_densevit.train --config=configs/instances/digits_hard.py:small --workdir=runs/digits_hard
           with MNIST's digits instead of scikit-learn's: --config.data.train.mnist=FOLDER_OF_IDX_FILES
Words:     embedding (default), token, box, unet, published, small, quick: as in `digits_easy.py`
Hardware:  a GPU; small: two CPU cores, 2 GB of memory
Expected:  the report: 62 % of the digits classified right, Dice loss 0.2, after 11,256 steps of 64 scenes
Run here:  only `quick`.
"""

from jax_densevit.configuration import sibling

recipe = sibling(__file__, "recipe.py")


def get_config(arg=""):
    """The config of one form."""
    return recipe.scenes(arg, overlap="allowed", amodal=True)
