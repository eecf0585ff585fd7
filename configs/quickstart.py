"""Quickstart: a small SETR-PUP that finds and names scattered handwritten digits, trained from scratch in minutes.

Scenes are drawn while training goes on, from 1,445 digits of scikit-learn's bundled set; those of the test scenes are
others. Eleven classes: background and the ten digits.

Command:   python -m jax_densevit.train --config=configs/quickstart.py --workdir=runs/quickstart
Words:     quick (steps of a second, learns nothing)
Hardware:  a laptop: two CPU cores, 2 GB of memory
           under 5 minutes, 0.2 s a step
Expected:  test mIoU 0.77 (val 0.78) on 1,000 scenes of unseen handwriting; 0.58 after 300 steps, 0.74 after 600
Run here:  in full, 2026-11-21, on two AMD EPYC cores: 4 min 47 s with start, compiling and evaluations.
"""

from jax_densevit.configuration import ConfigDict, default_config, default_evaluator, words

SIZE = 64


def get_config(arg=""):
    """The config; the word `quick` shrinks it to steps of a second."""
    quick = "quick" in words(arg, "quick")
    config = default_config()
    # Scenes full of large digits: background is learned soon, and a stroke is wider than the cells of the logits.
    scenes = {"name": "digit_scenes", "size": (SIZE, SIZE), "digits": (3, 5), "scale": (20, 32)}
    config.data.train = ConfigDict({**scenes, "split": "train"})
    # Four wide layers and few heads: on a CPU wide matrix products cost less than deep stacks of narrow ones.
    config.model = ConfigDict(
        {
            "name": "setr_pup",
            "patch_size": 8,
            "hidden_size": 192,
            "num_layers": 4,
            "num_heads": 3,
            "mlp_size": 768,
            "head_channels": 64,
            "auxiliary": False,
            "image_size": SIZE,
        }
    )
    config.task = ConfigDict({"name": "segmentation", "denominator": "valid"})
    config.steps = 1200
    config.batch_size = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 60
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.optimizer.b2 = 0.98
    config.ema = 0.98
    for split in ("val", "test"):
        evaluator = default_evaluator()
        evaluator.data = ConfigDict({**scenes, "split": split})
        evaluator.batch_size = 50
        config.eval[split] = evaluator
    config.eval.val.limit = 200
    config.eval.val.every = 300
    config.checkpoint.every = 300
    if quick:
        config.model.update(hidden_size=32, num_layers=2, num_heads=2, mlp_size=64, head_channels=16)
        config.steps = 2
        config.batch_size = 8
        config.optimizer.warmup_steps = 1
        for evaluator in config.eval.values():
            evaluator.data.length = 4
            evaluator.batch_size = 8
            evaluator.every = 0
        config.checkpoint.every = 2
        config.log.every = 1
    return config
