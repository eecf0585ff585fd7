"""What the configs of instances share."""

from jax_densevit.configuration import ConfigDict, choose, default_config, default_evaluator, words

HEADS = ("embedding", "token", "box")
MODELS = (*HEADS, "unet")


def scenes(arg, **scene):
    """Scattered digits, as the report on Seq2Seg has them: the config of one form, from its words."""
    given = words(arg, *MODELS, "small", "published", "quick")
    head = choose(given, *MODELS)
    small, published = "small" in given, "published" in given
    config = default_config()
    data = {
        "name": "digit_scenes",
        "size": (64, 64),
        "digits": (1, 4),
        "scale": (20, 20),
        "rotation": 0.0,
        "style": "plain",
        "mnist": "",
        **scene,
    }
    config.data.train = ConfigDict({**data, "split": "train"})
    evaluators(config, data, "mnist")
    if head == "unet":
        return _unet(config, data, given)
    config.model = ConfigDict({"name": "instance_seq2seg", "variant": "token" if published else head, "gray": True})
    config.task = ConfigDict({"name": "instances", "slots": 4})
    config.batch_size = 64
    config.steps = 11_256
    if published:
        config.task.update(class_weight=0.1, no_object=0.5, dice_squared=True)
        config.optimizer.schedule = "constant"
        config.optimizer.learning_rate = 1e-4
    else:
        config.model.update(norm_style="pre", auxiliary=True, dropout=0.0, attention_dropout=0.0, mask_size=32)
        config.task.update(bce_weight=1.0, no_object=0.4)
        if head == "box":
            config.task.update(l1_weight=5.0, giou_weight=2.0)
        adamw(config, 4e-4, 1000)
    if small:
        config.model.update(hidden_size=128, num_layers=4, num_heads=4, mlp_size=512, embedding_size=32, mask_stride=2)
        config.steps = 3000
        config.optimizer.learning_rate = 1e-3
        config.optimizer.warmup_steps = 200
    config.eval.val.every = config.steps // 12
    config.checkpoint.every = config.steps // 12
    if "quick" in given:
        config.model.update(hidden_size=32, num_layers=2, num_heads=2, mlp_size=48)
        shrink(config, {**data, "size": (32, 32), "digits": (1, 2), "scale": (12, 12)})
        config.model.image_size = (32, 32)
    return config


def _unet(config, data, given):
    """The same scenes by a Hungarian U-Net, whose output channels are the queries."""
    quick = "quick" in given
    side = 32 if quick else 64
    config.model = ConfigDict({"name": "hungarian_unet", "base": 16, "num_queries": 20, "auxiliary": True})
    config.model.image_size = (side, side)
    config.task = ConfigDict({"name": "instances", "slots": 4, "bce_weight": 1.0, "no_object": 0.2})
    config.batch_size = 32
    config.steps = 1500 if "small" in given else 11_256
    adamw(config, 2e-3, 100)
    config.eval.val.every = config.steps // 10
    config.checkpoint.every = config.steps // 10
    if quick:
        config.model.update(base=4, num_queries=5)
        shrink(config, {**data, "size": (side, side), "digits": (1, 2), "scale": (12, 12)})
    return config


def evaluators(config, data, *shared):
    """Validation, which decides, and test. One flag moves a `shared` option of all: --config.data.train.root=..."""
    for split in ("val", "test"):
        evaluator = default_evaluator()
        evaluator.data = ConfigDict({**data, "split": split})
        for name in shared:
            evaluator.data[name] = config.data.train.get_ref(name)
        config.eval[split] = evaluator
    config.checkpoint.best = "val/PQ"


def adamw(config, rate, warmup):
    """What query models train with: decay, clipped gradients, a warm-up, a moving average."""
    config.optimizer.learning_rate = rate
    config.optimizer.warmup_steps = warmup
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.ema = 0.99


def shrink(config, data):
    """Steps of a second that learn nothing, on digit scenes."""
    data = {"name": "digit_scenes", **data, "mnist": ""}
    config.data.train = ConfigDict({**data, "split": "train", "length": 16})
    config.batch_size = 8
    config.steps = 2
    config.optimizer.warmup_steps = 0
    for split, evaluator in config.eval.items():
        evaluator.data = ConfigDict({**data, "split": split, "length": 3})
        evaluator.every, evaluator.batch_size = 0, 8
    config.checkpoint.every = 2
    config.log.every = 1
