"""The Hungarian U-Net on Cityscapes' things at 128x256, as its report has it: 100 queries, Dice and classes.

Command:   python -m jax_densevit.train --config=configs/instances/cityscapes_unet.py \\
               --workdir=runs/cityscapes_instances --config.data.train.root=/data/cityscapes
Words:     bert (four transformer layers between encoder and decoder, the report's closing idea), quick (steps of a
           second, on digit scenes)
Hardware:  published: not said
Expected:  published: pictures only. It tells cars apart, with many redundant detections.
Run here:  only `quick`.
"""

from jax_densevit.configuration import ConfigDict, default_config, sibling, words

recipe = sibling(__file__, "recipe.py")
# 2,975 pictures in batches of 24, the last one dropped.
EPOCH = 123
SIZE = (128, 256)


def get_config(arg=""):
    """The config; `bert` adds layers, `quick` shrinks it."""
    given = words(arg, "bert", "quick")
    config = default_config()
    cities = {"name": "cityscapes", "root": "data/cityscapes", "size": SIZE, "instances": True}
    config.data.train = ConfigDict({**cities, "split": "train"})
    config.data.crop = SIZE
    recipe.evaluators(config, cities, "root")
    del config.eval["test"]  # its annotations are not public
    config.model = ConfigDict({"name": "hungarian_unet", "variant": "32-bert" if "bert" in given else "32"})
    config.task = ConfigDict({"name": "instances", "rules": "cityscapes", "slots": 64})
    # The benchmark's 100 pixels at 1024 x 2048.
    config.task.min_area = 100 / 64
    config.batch_size = 24
    config.steps = 30 * EPOCH
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "piecewise"
    config.optimizer.boundaries = (10 * EPOCH, 20 * EPOCH)
    config.optimizer.factors = (0.5, 0.1)
    config.eval.val.every = 5 * EPOCH
    config.checkpoint.every = 5 * EPOCH
    if "quick" in given:
        config.model.update(base=4, num_queries=5, image_size=(32, 32))
        recipe.shrink(config, {"size": (32, 32), "digits": (1, 3), "scale": (10, 14)})
        config.data.crop = (32, 32)
        config.optimizer.boundaries, config.optimizer.factors = (1,), (0.5,)
    return config
