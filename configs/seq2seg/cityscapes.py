"""Seq2Seg on Cityscapes at 128x256, with and without the sum over hidden states, and the U-Net beside it: its report's.

Command:   python -m jax_densevit.train --config=configs/seq2seg/cityscapes.py --workdir=runs/seq2seg_cityscapes \
               --config.data.train.root=/data/cityscapes
Words:     skip (default: the sum of all hidden states is decoded), no_skip (the last one only), unet (base 32), quick
           (steps of a second on digit scenes)
Hardware:  published: 0.2 s a step of 24 images, U-Net 0.3 s, on what is not said
Expected:  training / validation accuracy in percent, Seq2Seg 89.65 / 80.20, no_skip 85.32 / 78.85, unet 90.76 / 82.75.
           That is the share of right pixels among all 34 label ids, those that the benchmark leaves out included, in
           the middle of pictures of 140x280: `val/pixel_accuracy` here. No leaderboard's mIoU compares with it.
Run here:  only `quick`.
"""

from jax_densevit.configuration import ConfigDict, choose, default_config, default_evaluator, words

# 2,975 pictures in batches of 24, the last one dropped.
EPOCH = 123
# Form: epochs, learning rate, (epoch, factor) from which on it is multiplied.
SCHEDULES = {
    "skip": (45, 1e-4, ((15, 0.5), (30, 0.1))),
    "no_skip": (45, 5e-5, ((15, 0.2), (30, 0.1))),
    "unet": (30, 1e-3, ((10, 0.5), (20, 0.1))),
}
SIZE, CROP = (140, 280), (128, 256)


def get_config(arg=""):
    """The config of one form."""
    given = words(arg, *SCHEDULES, "quick")
    form = choose(given, *SCHEDULES)
    config = default_config()
    # Reading the full-size files takes longer than the step: `python -m jax_densevit.prepare` writes small ones once.
    cities = {"name": "cityscapes", "root": "data/cityscapes", "size": SIZE, "all_classes": True}
    config.data.train = ConfigDict({**cities, "split": "train"})
    config.data.crop = CROP
    if form == "unet":
        config.model = ConfigDict({"name": "unet", "variant": "32"})
    else:
        config.model = ConfigDict({"name": "seq2seg", "variant": form, "image_size": CROP})
    config.task = ConfigDict({"name": "segmentation", "loss_function": "bce"})
    epochs, rate, pieces = SCHEDULES[form]
    config.batch_size = 24
    config.steps = epochs * EPOCH
    config.optimizer.name = "adamw"  # without decay it is Adam
    config.optimizer.learning_rate = rate
    config.optimizer.schedule = "piecewise"
    config.optimizer.boundaries = tuple(epoch * EPOCH for epoch, _ in pieces)
    config.optimizer.factors = tuple(factor for _, factor in pieces)
    evaluator = default_evaluator()
    # One flag moves both: --config.data.train.root=...
    root = config.data.train.get_ref("root")
    evaluator.data = ConfigDict({**cities, "root": root, "split": "val", "centre_crop": CROP})
    evaluator.every = 5 * EPOCH
    config.eval.val = evaluator
    config.checkpoint.every = 5 * EPOCH
    config.checkpoint.best = "val/pixel_accuracy"
    if "quick" in given:
        scenes = {"name": "digit_scenes", "size": (40, 48)}
        config.data.train = ConfigDict({**scenes, "split": "train", "length": 16})
        config.data.crop = (32, 32)
        if form == "unet":
            config.model.base = 4
        else:
            config.model.update(hidden_size=32, num_layers=2, num_heads=2, mlp_size=48, patch_size=8)
            config.model.image_size = (32, 32)
        config.batch_size = 8
        config.steps = 2
        config.optimizer.boundaries, config.optimizer.factors = (1,), (0.5,)
        evaluator.data = ConfigDict({**scenes, "split": "val", "length": 3, "centre_crop": (32, 32)})
        evaluator.every = 0
        config.checkpoint.every = 2
        config.log.every = 1
    return config
