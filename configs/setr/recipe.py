"""The recipe that the three SETR configs share: SGD, poly decay, heads at ten times the rate, sliding windows.

Numbers are those of the released configs (fudan-zvg/SETR); the paper's text differs in some learning rates. With
`quick` everything shrinks to a few seconds on a CPU, on digit scenes instead of the data set.
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from jax_densevit.configuration import choose, default_config, default_evaluator, words

DECODERS = ("naive", "pup", "mla")
VARIANTS = {"large": "L/16", "base": "B/16", "deit": "DeiT-B/16"}
ROWS = tuple(f"{decoder}_{size}" for decoder in DECODERS for size in VARIANTS)
# Both repositories test with these; on ADE20K the released Naive and MLA configs have only the first three, which their
# resize rule makes equal: flipping is all they do.
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def setr(
    arg: str,
    *,
    source: str,
    root: str,
    crop: int,
    stride: int,
    box: tuple[int, int],
    batch_size: int,
    schedules: Mapping[str, int],
    learning_rates: Mapping[str, float],
) -> ConfigDict:
    """The config of one row.

    Args:
      arg: words: a row of `ROWS` (default `pup_large`); a schedule; `mmseg` for mmsegmentation's heads; `multiscale`
        for a second evaluation at the end with six scales and flip; `quick`.
      source: the data source; root: its default folder.
      crop: side of the training crop and of the windows; stride: distance of the windows.
      box: (long, short) box of the resize.
      batch_size: images per step.
      schedules: word -> steps; the first is the default.
      learning_rates: by decoder.
    """
    given = words(arg, *ROWS, *schedules, "mmseg", "multiscale", "quick")
    decoder, _, size = choose(given, *ROWS, default="pup_large").partition("_")
    config = default_config()
    config.model = ConfigDict(
        {
            "name": f"setr_{decoder}",
            "variant": VARIANTS[size],
            "flavor": "mmseg" if "mmseg" in given else "official",
            "image_size": crop,
            "dtype": "bfloat16",
            "scan": True,
            "remat": "dots_no_batch",
        }
    )
    config.task = ConfigDict({"name": "segmentation", "denominator": "all", "auxiliary_weight": 0.4})
    config.data.train = ConfigDict({"name": source, "root": root, "split": "train"})
    config.data.crop = (crop, crop)
    config.data.resize_box = box
    config.data.resize_ratio = (0.5, 2.0)
    config.data.max_class_ratio = 0.75
    config.data.flip = 0.5
    config.data.photometric = True
    config.steps = schedules[choose(given, *schedules)]
    config.batch_size = batch_size
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = learning_rates[decoder]
    config.optimizer.schedule = "poly"
    config.optimizer.min_learning_rate = 1e-4
    config.optimizer.multipliers = ((r"^(decode_head|auxiliary_head_\d+)/", 10.0),)  # not MLA's neck
    config.checkpoint.every = 4000
    config.checkpoint.best = "val/mIoU"
    config.eval.val = _evaluator(config, source, crop, stride, box)
    config.eval.val.every = 8000
    if "multiscale" in given:
        config.eval.val_multiscale = _evaluator(config, source, crop, stride, box)
        config.eval.val_multiscale.decode.update(scales=SCALES, flip=True, short_side_at_least=crop)
    if "quick" in given:
        _shrink(config)
    return config


def _evaluator(config: ConfigDict, source: str, crop: int, stride: int, box: tuple[int, int]) -> ConfigDict:
    evaluator = default_evaluator()
    # One flag moves both: --config.data.train.root=...
    root = config.data.train.get_ref("root")
    evaluator.data = ConfigDict({"name": source, "root": root, "split": "val"})
    evaluator.batch_size = 1
    evaluator.decode = ConfigDict({"mode": "slide", "crop": crop, "stride": stride, "base_size": box})
    return evaluator


def _shrink(config: ConfigDict) -> None:
    scenes = {"name": "digit_scenes", "size": (72, 80), "length": 16}
    config.model.update(hidden_size=32, num_layers=4, num_heads=2, mlp_size=64, head_channels=16, image_size=32)
    config.model.update(dtype="float32", remat="none")
    config.data.train = ConfigDict({**scenes, "split": "train"})
    config.data.crop = (32, 32)
    config.data.resize_box = (80, 72)
    for evaluator in config.eval.values():
        evaluator.data = ConfigDict({**scenes, "split": "val", "length": 3})
        evaluator.decode.update(crop=32, stride=24, base_size=(80, 72))
        if "short_side_at_least" in evaluator.decode:
            evaluator.decode.short_side_at_least = 32
        evaluator.every = 0
    config.steps = 2
    config.batch_size = 8
    config.checkpoint.every = 2
    config.log.every = 1
