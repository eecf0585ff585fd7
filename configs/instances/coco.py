"""COCO's objects by queries on a dense model: SETR's map as the embedding of pixels, 100 queries.

Command:   python -m jax_densevit.train --config=configs/instances/coco.py --workdir=runs/coco \\
               --config.data.train.images=/data/coco/train2017 \\
               --config.data.train.annotations=/data/coco/annotations/instances_train2017.json \\
               --config.eval.val.data.images=/data/coco/val2017 \\
               --config.eval.val.data.annotations=/data/coco/annotations/instances_val2017.json
Words:     panoptic (things and stuff: panoptic_{train,val}2017.json, their PNG beside them), quick (steps of a second,
           on digit scenes)
Hardware:  8 GPUs or a TPU slice: batches of 16 images of 512x512
Expected:  not known. Mask2Former on a ResNet-50 has AP 43.7 and PQ 51.9, after 50 epochs and with masked attention.
Run here:  only `quick`.
"""

from jax_densevit.configuration import ConfigDict, default_config, default_evaluator, sibling, words

recipe = sibling(__file__, "recipe.py")
SIDE = 512


def get_config(arg=""):
    """The config; `panoptic` learns stuff as well, `quick` shrinks it."""
    given = words(arg, "panoptic", "quick")
    kind = "panoptic" if "panoptic" in given else "instances"
    config = default_config()
    for split in ("train", "val"):
        where = {"images": f"data/coco/{split}2017", "annotations": f"data/coco/annotations/{kind}_{split}2017.json"}
        data = ConfigDict({"name": f"coco_{kind}", **where})
        if split == "train":
            config.data.train = data
            continue
        config.eval.val = default_evaluator()
        config.eval.val.data = data
        config.eval.val.decode = ConfigDict({"fixed_size": (SIDE, SIDE), "pairs": True, "top": 100})
    config.data.resize_box = (SIDE, SIDE)
    config.data.resize_ratio = (0.5, 2.0)
    config.data.crop = (SIDE, SIDE)
    config.data.flip = 0.5
    config.model = ConfigDict({"name": "queries", "variant": "setr", "image_size": SIDE})
    config.task = ConfigDict({"name": "instances", "panoptic": kind == "panoptic", "slots": 64})
    config.task.update(class_weight=2.0, bce_weight=5.0, dice_weight=5.0, points=12_544)
    config.batch_size = 16
    config.steps = 368_750  # 50 epochs
    recipe.adamw(config, 1e-4, 1000)
    config.eval.val.every = 10_000
    config.checkpoint.every = 5_000
    config.checkpoint.best = "val/PQ"
    if "quick" in given:
        small = {"hidden_size": 16, "num_layers": 4, "num_heads": 2, "mlp_size": 24, "head_channels": 8}
        config.model.backbone_options = {**small, "patch_size": 8, "image_size": 32}
        config.model.update(num_queries=5, embedding_size=8, hidden_size=16, num_heads=2, mlp_size=24, image_size=32)
        config.task.points = 64
        recipe.shrink(config, {"size": (32, 32), "digits": (1, 3), "scale": (10, 14)})
        config.eval.val.decode = ConfigDict({"fixed_size": (32, 32), "pairs": True, "top": 5})
        config.data.resize_box = (40, 40)
        config.data.crop = (32, 32)
    return config
