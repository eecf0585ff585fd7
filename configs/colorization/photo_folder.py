"""Colorization of your own photographs: copy this file, name your folder, train. Every line is yours to change.

Without labels: the photos are the truth, made gray for the model. Gray ones among them are found and left out.

Command:   python -m jax_densevit.train --config=configs/colorization/photo_folder.py --workdir=runs/photos
           --config.data.train.root=/data/photos
Words:     lab (the model predicts chroma only), study (loss, gray and optimizer of the comparison study), quick
Hardware:  one GPU with 12 GB for the U-Net of base 32 at 224 x 224; on a CPU set --config.model.base=12
Expected:  depends on the photos; regression gives natural skies, leaves and skin, and pale brown where colors are free
Run here:  only `quick`, which takes the sample photos in place of a folder.
"""

from jax_densevit.configuration import ConfigDict, default_config, default_evaluator, words

FOLDER = "data/photos"  # or --config.data.train.root=...; the evaluators follow


def get_config(arg=""):
    """The config; `study` is plain RGB regression on [0, 1] with red and blue swapped in the gray formula."""
    given = words(arg, "lab", "study", "quick")
    config = default_config()
    photos = {"name": "photo_folder", "root": FOLDER}
    if "study" in given:
        photos |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    # Subfolders train, val and test are the splits; without them, a hash of the names decides (80, 10, 10 %).
    config.data.train = ConfigDict({**photos, "split": "train"})
    config.data.crop = (224, 224)
    if "study" not in given:
        # Photos of 300 to 900 pixels, whatever the camera: people look at them so, and so are they fed below.
        config.data.resize_box = (600, 450)
        config.data.resize_ratio = (0.5, 1.5)
        config.data.flip = 0.5
    config.model = ConfigDict({"name": "unet", "base": 32})
    # Charbonnier with epsilon 1e-3 is nearly L1, which makes colors less pale than L2 does.
    config.task = ConfigDict({"name": "colorization", "target": "lab_ab" if "lab" in given else "rgb"})
    config.steps = 50_000
    config.batch_size = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 500
    config.optimizer.weight_decay = 0.02
    config.optimizer.clip_norm = 1.0
    config.ema = 0.999
    if "study" in given:
        config.task.gray = "study_bgr"
        config.optimizer.update(learning_rate=1e-4, schedule="constant", warmup_steps=0, clip_norm=0.0)
        config.batch_size = 4
        config.ema = 0.0
    for split in ("val", "test"):
        evaluator = default_evaluator()
        evaluator.data = ConfigDict({**photos, "root": config.data.train.get_ref("root"), "split": split})
        evaluator.batch_size = 1
        if "study" not in given:
            evaluator.decode = ConfigDict({"max_side": 600})
        config.eval[split] = evaluator
    config.eval.val.every = 2500
    config.checkpoint.every = 2500
    config.checkpoint.best = "val/PSNR"
    if "quick" in given:
        for split, data in {"train": config.data.train, **{s: e.data for s, e in config.eval.items()}}.items():
            with data.unlocked():
                data.update(name="sample_photos", split=split)
                del data["root"]
        config.model.base = 4
        config.batch_size = 8
        config.data.crop = (32, 32)
        config.steps = 2
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 1)
        for evaluator in config.eval.values():
            evaluator.decode.max_side = 64
            evaluator.batch_size = 8
            evaluator.every = 0
        config.checkpoint.every = 2
        config.log.every = 1
    return config
