"""The config of an experiment: its fields with their defaults, read from a Python file, checked before anything starts.

A config file defines `get_config(arg="")`, takes :func:`default_config` and fills it in. Sections that build an object
by name (`model`, `task`, a data source, an optimizer) take that object's own keyword arguments beside `name`; the other
sections have exactly the fields below.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def default_config() -> ConfigDict:
    """Every field of an experiment with its default. Sections marked `+` also take their object's keyword arguments."""
    return ConfigDict(
        {
            "seed": 0,
            # What is computed. `num_classes` of the model is filled in from the data.
            "model": {"name": ""},  # +
            "task": {"name": "segmentation"},  # +
            # What is learned from. `train` names a source; crop is (height, width) of the training batches.
            "data": {
                "train": {"name": ""},  # +
                "crop": (0, 0),
                # Variable-size work before the crop (tf.data): random keep-aspect resize of the longer and shorter side
                # into `resize_box` (long, short) times a ratio drawn from `resize_ratio`; (0, 0) leaves sizes alone.
                "resize_box": (0, 0),
                "resize_ratio": (1.0, 1.0),
                # Redraw a crop (10 tries) while one class covers more than this share of its labelled pixels; 1 = off.
                "max_class_ratio": 1.0,
                # Fixed-size work on the device.
                "flip": 0.0,
                "vertical_flip": 0.0,
                "rotate90": False,
                "photometric": False,
                # Unreadable training files: "fail", or "skip" (counted in the log).
                "on_bad": "fail",
                # Threads that read and decode; 0 picks the number of cores.
                "threads": 0,
            },
            # Evaluators by name: {"data": {"name": ..., +}, "mode": "whole" | "slide", ...}, see `default_evaluator`.
            "eval": {},
            # How long, how big.
            "steps": placeholder(int),
            "epochs": placeholder(float),
            "batch_size": 8,
            "accumulate": 1,
            "optimizer": {
                "name": "adamw",  # "adamw", "sgd", "rmsprop_legacy"
                "learning_rate": 1e-3,
                "schedule": "cosine",  # "constant", "cosine", "poly"
                "warmup_steps": 0,
                "min_learning_rate": 0.0,
                "power": 0.9,  # of "poly"
                "momentum": 0.9,  # of "sgd", "rmsprop_legacy"
                "b1": 0.9,
                "b2": 0.999,
                "weight_decay": 0.0,  # matrices and kernels only: vectors are never decayed
                "clip_norm": 0.0,  # 0 = no clipping
                # (regular expression over parameter paths "a/b/c", factor on the learning rate); first match wins,
                # a pattern that matches nothing is an error. Factor 0 freezes.
                "multipliers": (),
            },
            "ema": 0.0,  # decay of the moving average of parameters; 0 = none
            # One of the three may be -1: whatever devices remain.
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            # Regular expressions over parameter paths and the mesh axis per dimension, tried before automatic FSDP.
            "sharding_rules": (),
            # Start from the parameters of another workdir; patterns name what may be left at its initial value.
            "init": {"workdir": "", "leave_out": ()},
            "checkpoint": {"every": 1000, "keep": 2, "best": ""},  # best: "<evaluator>/<number>", e.g. "val/mIoU"
            "log": {"every": 50, "tensorboard": True, "profile_at": 0},
        }
    )


def default_evaluator() -> ConfigDict:
    """The fields of one entry of `config.eval`."""
    return ConfigDict(
        {
            "data": {"name": ""},  # +
            "every": 0,  # steps between evaluations; 0 = only at the end
            "batch_size": 0,  # 0 = the training batch size
            "limit": 0,  # evaluate only the first so many examples; 0 = all
            "sheet": 6,  # examples on the picture sheet
            "decode": {},  # overrides of the task's decoding fields for this evaluator, e.g. {"mode": "slide"}
        }
    )
