"""Nuclei one by one: a Hungarian U-Net, each output channel the mask of a query.

Data:      as `configs/nuclei.py`: `<root>/{train,val,test}/{images,instances}`, object numbers in 16-bit PNG
Command:   python -m jax_densevit.train --config=configs/instances/nuclei.py --workdir=runs/nuclei_instances \\
               --config.data.train.root=/data/nuclei
Words:     quick (steps of a second, on digit scenes)
Hardware:  two CPU cores, 3 GB of memory, a quarter of an hour
Expected:  in tiles of 64x64 (nuclei at their borders count in each), test: PQ 0.53, AP 0.32, AP50 0.60
Run here:  in full, on the 160 pictures of docs/benchmarks.md, see docs/studies/objects.md; and `quick`.
"""

from jax_densevit.configuration import ConfigDict, default_config, sibling, words

recipe = sibling(__file__, "recipe.py")
SIDE = 64


def get_config(arg=""):
    """The config; `quick` shrinks it."""
    given = words(arg, "quick")
    config = default_config()
    nuclei = {"name": "instance_folder", "root": "data/nuclei", "classes": ("background", "nucleus")}
    config.data.train = ConfigDict({**nuclei, "split": "train"})
    config.data.crop = (SIDE, SIDE)
    config.data.flip = 0.5
    config.data.rotate90 = True
    # A query is a channel: it cannot answer for a place it has never seen, so all see crops of one size.
    recipe.evaluators(config, {**nuclei, "tiles": (SIDE, SIDE)}, "root")
    config.model = ConfigDict({"name": "hungarian_unet", "base": 16, "num_queries": 32, "auxiliary": True})
    config.model.image_size = (SIDE, SIDE)
    config.task = ConfigDict(
        {"name": "instances", "slots": 32, "bce_weight": 2.0, "dice_weight": 2.0, "no_object": 0.2}
    )
    config.batch_size = 16
    config.steps = 2000
    recipe.adamw(config, 1e-3, 100)
    config.eval.val.every = 400
    config.checkpoint.every = 400
    if "quick" in given:
        config.model.update(base=4, num_queries=5, image_size=(32, 32))
        recipe.shrink(config, {"size": (32, 32), "digits": (1, 3), "scale": (10, 14)})
        config.data.crop = (32, 32)
    return config
