"""Three large trainings, to plan on machines that are not here: real models and crops, pictures that stand in.

Command:   python -m jax_densevit.train --config=configs/scaling.py:setr --dry_run --devices=8,64,256,1024
Words:     setr (SETR-PUP with ViT-L at 768 x 768, Cityscapes' recipe), coltran (its colorizer at 64 x 64), uformer
           (Uformer-B colorizes at 256 x 256)
Hardware:  plans need a laptop; the trainings, what the plans say. The batch below is that of 8 chips
Expected:  docs/scaling.md has the tables
Run here:  plans only. To train, take configs/setr, configs/coltran or configs/colorization
"""

from jax_densevit.configuration import ConfigDict, choose, default_config, sibling, words

setr = sibling(__file__, "setr/cityscapes.py")
coltran = sibling(__file__, "coltran/colorizer.py")


def get_config(arg=""):
    """The config of one of the three, SETR by default; no evaluations."""
    which = choose(words(arg, "setr", "coltran", "uformer"), "setr", "coltran", "uformer")
    if which == "setr":
        config = setr.get_config("pup_large")
        scenes = {"name": "digit_scenes", "size": (1024, 2048), "split": "train", "length": 8}
        config.data.train = ConfigDict(scenes)
        config.data.resize_box = (0, 0)
        config.data.resize_ratio = (1.0, 1.0)
        config.batch_size = 16
        config.mesh.fsdp = 8
    elif which == "coltran":
        config = coltran.get_config("samples")
        config.batch_size = 112  # the published 224 are for 16 chips
    else:
        config = default_config()
        config.data.train = ConfigDict({"name": "sample_photos", "split": "train"})
        config.data.crop = (256, 256)
        config.data.flip = 0.5
        config.model = ConfigDict({"name": "uformer", "variant": "B", "dtype": "bfloat16"})
        config.task = ConfigDict({"name": "colorization", "target": "rgb"})
        config.steps = 100_000
        config.batch_size = 32
        config.optimizer.update(learning_rate=2e-4, weight_decay=0.02)
        config.ema = 0.999
    config.eval = ConfigDict({})
    config.checkpoint.best = ""
    return config
