"""The recipe that ColTran's three stages share: constant RMSprop, a moving average, squares of 256 pixels.

Numbers are those of the published configs (google-research/coltran), whose batch sizes are per core, of 32 cores. The
stages are trained independently of each other, from ground truth, in any order or at once.
"""

from ml_collections import ConfigDict

from jax_densevit.configuration import choose, default_config, default_evaluator, words

DATA = ("imagenet", "cifar10", "photos", "samples")
# The order of examples in a slice is fixed: what is held out for validation is never trained on.
SPLITS = {"train": "train[:-10000]", "val": "train[-10000:]", "test": "validation"}
CIFAR_SPLITS = {"train": "train[:-5000]", "val": "train[-5000:]", "test": "test"}
PHOTO = (256, 256)
# Of `quick`: minutes on two cores. Coarse colors of 32 x 32 pixels and final ones of 64 x 64 suffice for small photos.
QUICK = {"hidden_size": 64, "mlp_size": 64, "num_heads": 2}
QUICK_PHOTO = (64, 64)


def coltran(
    arg: str,
    *,
    stage: str,
    sizes: dict,
    quick: dict,
    layers: dict,
    quick_steps: int,
    steps: int,
    batch_size: int,
    variants: dict | None = None,
) -> ConfigDict:
    """The config of one stage.

    Args:
      arg: words: one of `variants` or `small` (half the width); where photos come from, `imagenet` (the default),
        `cifar10` (as they are, 32 x 32 pixels; not for a stage that enlarges), `photos` (a folder) or `samples` (those
        that come with pip, the default of `quick`); `quick`.
      stage: name of model and task.
      sizes: the task's fields; quick: the same for `quick`, whose model has `layers`, trained for `quick_steps`.
      steps, batch_size: of the published training.
      variants: word -> variant of the model.
    """
    variants = {**(variants or {}), "small": "small"}
    enlarges = sizes.get("coarse_size", sizes["image_size"]) != sizes["image_size"]
    known = [name for name in DATA if name != "cifar10" or not enlarges]
    given = words(arg, *variants, *known, "quick")
    data = choose(given, *known, default="samples" if "quick" in given else "imagenet")
    sizes = {"photo_size": QUICK_PHOTO, **quick} if "quick" in given else {"photo_size": PHOTO, **sizes}
    if data == "cifar10":
        sizes = dict.fromkeys(sizes, (32, 32))
    variant = variants.get(choose(given, *variants, default=""), "ColTran")
    if variant == "ColTran-S":
        sizes["image_size"] = (28, 28)
    config = default_config()
    config.model = ConfigDict({"name": stage, "variant": variant})
    # The published trainings were in float32. Layers are computed again in the backward pass, which needs less memory.
    config.model.update(image_size=sizes["image_size"], dtype="bfloat16", remat="full")
    config.task = ConfigDict({"name": stage, **sizes})
    config.data.crop = sizes["photo_size"]
    config.data.largest_crop = True
    for split in ("train", "val", "test"):
        source = {
            "imagenet": {"name": "tfds_photos", "dataset": "imagenet2012", "data_dir": "", "split": SPLITS[split]},
            "cifar10": {"name": "tfds_photos", "dataset": data, "data_dir": "", "split": CIFAR_SPLITS[split]},
            "photos": {"name": "photo_folder", "root": "data/photos", "split": split},
            "samples": {"name": "sample_photos", "split": split},
        }[data]
        if split == "train":
            config.data.train = ConfigDict(source)
            continue
        followed = {name: config.data.train.get_ref(name) for name in ("dataset", "data_dir", "root") if name in source}
        evaluator = default_evaluator()
        evaluator.data = ConfigDict({**source, **followed, "largest_crop": sizes["photo_size"]})
        evaluator.batch_size = 16
        config.eval[split] = evaluator
    config.steps = steps
    config.batch_size = batch_size
    config.optimizer.update(name="rmsprop_legacy", learning_rate=3e-4, schedule="constant", momentum=0.9)
    config.ema = 0.999
    config.eval.val.every = 10_000
    config.checkpoint.every = 2_000
    config.checkpoint.best = "-val/bits"
    if "quick" in given:
        config.model.update(**QUICK, **layers, dtype="float32", remat="none")
        config.steps = quick_steps
        config.batch_size = 4
        # Few steps: a higher rate that falls, and an average that forgets sooner.
        config.optimizer.update(learning_rate=3e-3, schedule="cosine", warmup_steps=20)
        config.ema = 0.99
        config.eval.val.every = 500
        config.checkpoint.every = 500
    return config
