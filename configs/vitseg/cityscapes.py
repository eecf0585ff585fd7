"""ViTSeg without convolutions on Cityscapes at 256x256, as its report trained it but for its bug; its spiral decoder.

Command:   python -m jax_densevit.train --config=configs/vitseg/cityscapes.py --workdir=runs/vitseg_cityscapes \
               --config.data.train.root=/data/cityscapes
Words:     grid (default: every token paints its own block), rows (as published: token i paints row i, whence the
           stripes), spiral (labels patch by patch from the centre outward; not in the report but as an idea, and with
           settings of ours), quick (steps of a second on digit scenes)
Hardware:  published: 100 epochs in 45 minutes, on what is not said; 60.9 million parameters, 2.2 GMACs an image
Expected:  the report shows its scores in figures only. Its "accuracy" compares channels of colours, not classes, so its
           place on a leaderboard of mIoU means nothing; `val` is the mIoU of what was painted, at 256x256, and
           `val_full` that at the 1024x2048 of the benchmark.
Run here:  only `quick`; grid against rows at a small size: docs/studies/vitseg_rows_and_grid.md.
"""

from jax_densevit.configuration import ConfigDict, choose, default_config, default_evaluator, sibling, words

recipe = sibling(__file__, "recipe.py")
SIDE = 256


def get_config(arg=""):
    """The config of one form of the model."""
    given = words(arg, *recipe.FORMS, "quick")
    form = choose(given, *recipe.FORMS)
    config = default_config()
    # Resized with the aspect lost, 1024x2048 to 256x256, as the pairs that the report found were. Reading the full-size
    # files takes longer than the step: `python -m jax_densevit.prepare` writes them once.
    cities = {"name": "cityscapes", "root": "data/cityscapes"}
    config.data.train = ConfigDict({**cities, "split": "train", "size": (SIDE, SIDE)})
    config.model, config.task = recipe.model(form), recipe.task(form)
    recipe.schedule(config, form)
    # 100 epochs of 2,975 pictures. The batch size is not in the report; 32 is the default of Keras.
    config.batch_size = 32
    config.steps = 9_297
    # One flag moves all: --config.data.train.root=...
    root = config.data.train.get_ref("root")
    config.eval.val = default_evaluator()
    config.eval.val.data = ConfigDict({**cities, "root": root, "split": "val", "size": (SIDE, SIDE)})
    config.eval.val.every = 930
    config.eval.val_full = default_evaluator()
    config.eval.val_full.data = ConfigDict({**cities, "root": root, "split": "val"})
    config.eval.val_full.batch_size = 4
    config.eval.val_full.decode.fixed_size = (SIDE, SIDE)
    config.checkpoint.best = "val/mIoU"
    config.checkpoint.every = 930
    if "quick" in given:
        recipe.shrink(config, form)
    return config
