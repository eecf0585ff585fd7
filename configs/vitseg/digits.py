"""ViTSeg on scenes of digits in minutes: what painting rows instead of blocks costs after equal steps.

Command:   python -m jax_densevit.train --config=configs/vitseg/digits.py:grid --workdir=runs/vitseg_grid
           python -m jax_densevit.train --config=configs/vitseg/digits.py:rows --workdir=runs/vitseg_rows
           python -m jax_densevit.studies.curves runs/vitseg_grid runs/vitseg_rows --output=curves.png
Words:     grid (default), rows, spiral, quick (steps of a second, learns nothing)
Hardware:  a laptop: two CPU cores, 2 GB of memory; some minutes each
Expected:  val mIoU after 200 steps: grid 0.101, rows 0.074 (all background); see docs/studies/vitseg_rows_and_grid.md
Run here:  200 of the 500 steps, 2026-11-21, on two busy AMD EPYC cores; `spiral` only with quick.
"""

from jax_densevit.configuration import ConfigDict, choose, default_config, default_evaluator, sibling, words

recipe = sibling(__file__, "recipe.py")
SIDE = 64
# The published proportions, smaller. Patches of 8 in pictures of 64: token i paints row i, as 16 and 256 had it.
SIZES = {
    "projection_size": 120,
    "num_layers": 3,
    "num_heads": 4,
    "head_size": 32,
    "mlp_sizes": (256, 256),
    "feature_sizes": (256, 512),
    "decoder_projection": 120,
    "decoder_sizes": (256, 256, 256),
}
SPIRAL = {"hidden_size": 128, "num_layers": 3, "num_heads": 4, "mlp_size": 512, "decoder_layers": 2}


def get_config(arg=""):
    """The config of one form; all see the same scenes in the same order."""
    given = words(arg, *recipe.FORMS, "quick")
    form = choose(given, *recipe.FORMS)
    config = default_config()
    scenes = {"name": "digit_scenes", "size": (SIDE, SIDE), "digits": (3, 5), "scale": (20, 32)}
    config.data.train = ConfigDict({**scenes, "split": "train"})
    config.model = recipe.model(form, patch_size=8, image_size=SIDE, **(SPIRAL if form == "spiral" else SIZES))
    config.task = recipe.task(form)
    recipe.schedule(config, form)
    config.batch_size = 32
    config.steps = 500
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 50)
    config.eval.val = default_evaluator()
    config.eval.val.data = ConfigDict({**scenes, "split": "val"})
    config.eval.val.limit = 200
    config.eval.val.every = 50
    config.eval.val.batch_size = 50
    config.checkpoint.every = 500
    if "quick" in given:
        recipe.shrink(config, form)
    return config
