"""Colorization of photographs that come with pip: a small U-Net learns from six photos and colors two it never saw.

Six photos teach what sky, skin and metal look like in those photos, and no more: a run shows that everything works, not
what colorization can do. For that, see photo_folder.py.

Command:   python -m jax_densevit.train --config=configs/colorization/sample_photos.py --workdir=runs/colors
Words:     lab (the model predicts chroma; lightness is that of the input), quick (steps of a second, learns nothing)
Hardware:  a laptop: two CPU cores, 2 GB of memory
Expected:  the training loss falls below that of gray; the two unseen photos score worse than gray ("all gray")
Run here:  only `quick`; shorter runs on smaller crops (U-Net, and a small ViT on chroma) gave that; not yet in full
"""

from jax_densevit.configuration import ConfigDict, default_config, default_evaluator, words


def get_config(arg=""):
    """The config; the word `quick` shrinks it to steps of a second."""
    given = words(arg, "lab", "quick")
    config = default_config()
    config.data.train = ConfigDict({"name": "sample_photos", "split": "train"})
    # The photos differ in magnification more than in number: random sizes make more of them.
    config.data.resize_box = (400, 300)
    config.data.resize_ratio = (0.5, 1.5)
    config.data.crop = (96, 96)
    config.data.flip = 0.5
    config.model = ConfigDict({"name": "unet", "base": 12})
    config.task = ConfigDict({"name": "colorization", "target": "lab_ab" if "lab" in given else "rgb"})
    config.steps = 600
    config.batch_size = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.ema = 0.99
    for split in ("val", "test"):
        evaluator = default_evaluator()
        evaluator.data = ConfigDict({"name": "sample_photos", "split": split})
        evaluator.batch_size = 1
        # Around the size at which the photos were seen in training; lightness is that of the photo at its own size.
        evaluator.decode = ConfigDict({"max_side": 320})
        config.eval[split] = evaluator
    config.eval.val.every = 200
    config.checkpoint.every = 200
    config.checkpoint.best = "val/PSNR"
    if "quick" in given:
        config.model.base = 4
        config.batch_size = 8
        config.data.resize_box = (80, 64)
        config.data.crop = (32, 32)
        config.steps = 2
        config.optimizer.warmup_steps = 1
        for evaluator in config.eval.values():
            evaluator.batch_size = 8
            evaluator.decode = ConfigDict({"max_side": 64})
            evaluator.every = 0
        config.checkpoint.every = 2
        config.log.every = 1
    return config
