"""What the ViTSeg configs share: the published hyperparameters, the spiral decoder's, and the `quick` size."""

from ml_collections import ConfigDict

FORMS = ("grid", "rows", "spiral")


def model(form: str, **sizes) -> ConfigDict:
    """The model of a form; `sizes` are options beside the published ones."""
    if form == "spiral":
        return ConfigDict({"name": "spiral", "variant": "Ti/16", "dropout": 0.1, **sizes})
    return ConfigDict({"name": "vitseg", "variant": form, **sizes})


def task(form: str) -> ConfigDict:
    """Colours compared by the mean absolute error, as published; the spiral decoder learns classes."""
    if form == "spiral":
        return ConfigDict({"name": "spiral", "denominator": "valid"})
    return ConfigDict({"name": "palette", "loss_function": "mae"})


def schedule(config: ConfigDict, form: str) -> None:
    """The published rate, constant; a warm-up and a cosine for the spiral decoder."""
    config.optimizer.name = "adamw"
    if form == "spiral":
        config.optimizer.learning_rate = 5e-4
        config.optimizer.warmup_steps = 500
        config.optimizer.weight_decay = 0.05
        config.optimizer.clip_norm = 1.0
        return
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.schedule = "constant"
    # Per unit of the rate, as AdamW is in Keras. TensorFlow Addons', which the tutorial that the report follows takes,
    # does not multiply by the rate: there the same number decays as 1e-4 / 1.5e-3 = 0.067 does here.
    config.optimizer.weight_decay = 1e-4


def shrink(config: ConfigDict, form: str) -> None:
    """Steps of a second, on scenes of digits of 64x64: 64 tokens of 64 pixels, so that rows are rows."""
    scenes = {"name": "digit_scenes", "size": (64, 64)}
    config.data.train = ConfigDict({**scenes, "split": "train", "length": 16})
    config.model.update(patch_size=8, image_size=64, num_layers=2, num_heads=2)
    if form == "spiral":
        config.model.update(hidden_size=32, mlp_size=64, decoder_layers=1)
    else:
        config.model.update(projection_size=24, head_size=16, mlp_sizes=(32, 48), feature_sizes=(32, 32))
        config.model.update(token_features=8, decoder_projection=24, decoder_sizes=(32, 32))
    config.steps = 2
    config.batch_size = 8
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 1)
    for evaluator in config.eval.values():
        evaluator.data = ConfigDict({**scenes, "split": "val", "length": 3})
        evaluator.every = 0
        if "fixed_size" in evaluator.decode:
            evaluator.decode.fixed_size = (64, 64)
    config.checkpoint.every = 2
    config.log.every = 1
