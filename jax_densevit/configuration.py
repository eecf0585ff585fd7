"""The config of an experiment: its fields with their defaults, read from a Python file, checked before anything starts.

A config file defines `get_config(arg="")`, takes :func:`default_config` and fills it in. Sections that build an object
by name (`model`, `task`, a data source, an optimizer) take that object's own keyword arguments beside `name`; the other
sections have exactly the fields below.
"""

import ast
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jax_densevit.errors import UserError, did_you_mean


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
                # In place of that: the largest window of the crop's proportions, at a random place, averaged to it.
                "largest_crop": False,
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
                "schedule": "cosine",  # "constant", "cosine", "poly", "piecewise"
                "warmup_steps": 0,
                "min_learning_rate": 0.0,
                "power": 0.9,  # of "poly"
                # Of "piecewise": from step boundaries[i] on the rate is learning_rate * factors[i].
                "boundaries": (),
                "factors": (),
                "momentum": 0.9,  # of "sgd"; of "rmsprop_legacy" the decay of the mean square
                "b1": 0.9,
                "b2": 0.999,
                "weight_decay": 0.0,  # matrices and kernels only: vectors are never decayed
                "clip_norm": 0.0,  # 0 = no clipping
                # (regular expression over parameter paths "a/b/c", factor on the learning rate); first match wins,
                # a pattern that matches nothing is an error. Factor 0 freezes.
                "multipliers": (),
            },
            "ema": 0.0,  # decay of the moving average of parameters and batch-norm statistics; 0 = none
            # A step whose loss or gradient is not finite: "stop", or "skip" (it changes nothing; ten in a row stop).
            "on_not_finite": "stop",
            # One of the three may be -1: whatever devices remain.
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            # Regular expressions over parameter paths and the mesh axis per dimension, tried before automatic FSDP.
            "sharding_rules": (),
            # Start from the parameters of another workdir; patterns name what may be left at its initial value.
            "init": {"workdir": "", "leave_out": ()},
            # best: "<evaluator>/<number>", e.g. "val/mIoU"; "-val/L1" where less is better.
            "checkpoint": {"every": 1000, "keep": 2, "best": ""},
            # profile_at: the step after which `profile_steps` steps are traced into workdir/profile; 0 = none.
            "log": {"every": 50, "tensorboard": True, "profile_at": 0, "profile_steps": 5},
        }
    )


def default_evaluator() -> ConfigDict:
    """The fields of one entry of `config.eval`."""
    return ConfigDict(
        {
            # +, and centre_crop=(height, width) to evaluate the middle of every picture only, or tiles=(height, width)
            # to evaluate all of it in windows of that size.
            "data": {"name": ""},
            "every": 0,  # steps between evaluations; 0 = only at the end
            "batch_size": 0,  # 0 = the training batch size
            "limit": 0,  # evaluate only the first so many examples; 0 = all
            "sheet": 6,  # examples on the picture sheet
            "decode": {},  # overrides of the task's decoding fields for this evaluator, e.g. {"mode": "slide"}
        }
    )


# Sections whose fields are the keyword arguments of what they name: any key may be added, the object checks it.
_OPEN = re.compile(r"^(model|task|data\.train|eval\.[^.]+\.data|eval\.[^.]+\.decode)(\.|$)")


def words(arg: str, *known: str) -> frozenset[str]:
    """The words of a config argument (`file.py:large,quick`), each of them known; `UserError` for one that is not."""
    given = [word for word in arg.split(",") if word]
    for word in given:
        if word not in known:
            raise UserError(f"The config takes no argument {word!r}{did_you_mean(word, known)}")
    return frozenset(given)


def choose(given: frozenset[str], *options: str, default: str | None = None) -> str:
    """The one of `options` among the words of a config argument; the default (the first) when none of them is given."""
    chosen = [option for option in options if option in given]
    if len(chosen) > 1:
        raise UserError(f"The config argument names both {chosen[0]!r} and {chosen[1]!r}; keep one of them.")
    return chosen[0] if chosen else (options[0] if default is None else default)


def sibling(config_file: str, name: str):
    """The module `name` beside a config file, for what several configs share: `sibling(__file__, "recipe.py")`."""
    return _load(Path(config_file).parent / name)


def split_overrides(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Takes the `--config.a.b=value` flags out of a command line: ({"a.b": "value"}, the other arguments)."""
    overrides, rest, arguments = {}, [], iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        path, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            value = next(arguments, None)
            if value is None:
                raise UserError(f"{argument} has no value; write {argument}=VALUE.")
        overrides[path] = value
    return overrides, rest


def read_config(
    path: str,
    overrides: Mapping[str, str] | None = None,
    check: Callable[[ConfigDict], None] | None = None,
    open_sections: re.Pattern = _OPEN,
) -> ConfigDict:
    """Reads `file.py` or `file.py:arg`, applies overrides (`{"optimizer.learning_rate": "1e-3"}`) and checks every key.

    Args:
      path: the file, and its argument after a colon.
      overrides: values as text, by the path of the field.
      check: what raises :class:`UserError` for a config that makes no sense; None is :func:`check_config`.
      open_sections: matches the paths of sections to which overrides may add fields.

    Raises:
      UserError: no such file, no `get_config`, an argument or key that does not exist (with the nearest name), a value
        of the wrong type, or values that contradict each other.
    """
    file, colon, arg = path.partition(":")
    if not Path(file).is_file():
        raise UserError(f"There is no config file {file!r}; configs of the library live in configs/.")
    module = _load(Path(file))
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{file} defines no get_config(arg); see configs/quickstart.py for the form.")
    config = module.get_config(arg) if colon else module.get_config()
    for key, value in (overrides or {}).items():
        _override(config, key, value, open_sections)
    (check or check_config)(config)
    return config


def _load(file: Path):
    spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}: {error.msg}.") from error
    return module


def check_config(config: ConfigDict, where: str = "config") -> None:
    """Raises :class:`UserError` for a key that no section knows, or for values that contradict each other.

    Args:
      config: of an experiment.
      where: what it is called in messages.
    """
    check_keys(config, default_config(), where=where)
    for name, evaluator in config.eval.items():
        check_keys(evaluator, default_evaluator(), f"eval.{name}", where=where)
    if (config.steps is None) == (config.epochs is None):
        raise UserError(f"Set exactly one of {where}.steps and {where}.epochs: how long to train.")
    if config.batch_size < 1 or config.batch_size % config.accumulate:
        raise UserError(
            f"{where}.batch_size={config.batch_size} must be a positive multiple of "
            f"{where}.accumulate={config.accumulate}."
        )
    if config.data.on_bad not in ("fail", "skip"):
        raise UserError(f"{where}.data.on_bad={config.data.on_bad!r} must be 'fail' or 'skip'.")
    if config.on_not_finite not in ("stop", "skip"):
        raise UserError(f"{where}.on_not_finite={config.on_not_finite!r} must be 'stop' or 'skip'.")
    best = config.checkpoint.best.removeprefix("-")
    if best and best.partition("/")[0] not in config.eval:
        raise UserError(f"{where}.checkpoint.best={best!r} names no evaluator{did_you_mean(best, config.eval)}")


def config_from_json(values: Mapping) -> ConfigDict:
    """The inverse of `config.to_dict()` through JSON: lists become tuples again, missing new fields their defaults."""
    config = default_config()
    with config.unlocked():
        _merge(config, _tuples(values))
    for name in list(config.eval):
        evaluator = default_evaluator()
        with evaluator.unlocked():
            _merge(evaluator, config.eval[name].to_dict())
        with config.unlocked():
            config.eval[name] = evaluator
    return config


def _tuples(value):
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _merge(config: ConfigDict, values: Mapping) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), ConfigDict):
            _merge(config[key], value)
        elif value is not None or key not in config:
            config[key] = ConfigDict(dict(value)) if isinstance(value, Mapping) else value


def check_keys(
    config: ConfigDict, known: ConfigDict, prefix: str = "", *, open_sections: re.Pattern = _OPEN, where: str = "config"
) -> None:
    """Raises :class:`UserError` for a key of `config` that `known` lacks, naming the nearest one.

    Args:
      config: a config, or the section of one at the path `prefix`.
      known: the same with every field there is.
      open_sections: matches the paths of sections that take any key.
      where: what the whole is called in messages.
    """
    for key, value in config.items():
        path = f"{prefix}.{key}" if prefix else key
        if open_sections.match(path) or (prefix == "eval" and isinstance(value, ConfigDict)):
            continue
        if key not in known:
            raise UserError(f"There is no config field {where}.{path}{did_you_mean(key, known)}")
        if isinstance(value, ConfigDict):
            check_keys(value, known[key], path, open_sections=open_sections, where=where)


def _override(config: ConfigDict, path: str, text: str, open_sections: re.Pattern) -> None:
    *sections, last = path.split(".")
    node = config
    for depth, section in enumerate(sections):
        if not isinstance(node, ConfigDict) or section not in node:
            at = ".".join(["config", *sections[:depth]])
            known = node.keys() if isinstance(node, ConfigDict) else ()
            raise UserError(f"--config.{path}: {at} has no section {section!r}{did_you_mean(section, known)}")
        node = node[section]
    if not isinstance(node, ConfigDict) or (last not in node and not open_sections.match(path)):
        known = node.keys() if isinstance(node, ConfigDict) else ()
        raise UserError(f"--config.{path}: there is no such field{did_you_mean(last, known)}")
    kind = node.get_type(last) if last in node else None
    if kind is not None and issubclass(kind, ConfigDict):
        raise UserError(f"--config.{path} is a section; set one of its fields: {', '.join(node[last].keys())}.")
    with config.unlocked():
        node[last] = _parse(path, text, None if kind is type(None) else kind)


def _parse(path: str, text: str, kind: type | None):
    """`text` as a value of type `kind`; as a Python literal, else a string, where no type is known."""
    if kind is str:
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if kind is not None and type(value) is not kind:
        raise UserError(f"--config.{path}={text}: expected a value of type {kind.__name__}.")
    return value
