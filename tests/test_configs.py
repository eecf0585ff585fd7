"""Every config of the library: its words, its model at full size, one real step at its `quick` size."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.configuration import read_config
from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError
from jax_densevit.experiment import build
from jax_densevit.models import QueryOutput, create_model
from jax_densevit.models.registry import example_inputs, find_model
from jax_densevit.tasks import create_task
from jax_densevit.training.mesh import put_batch
from jax_densevit.training.optimizer import make_optimizer
from jax_densevit.training.state import abstract_parameters, abstract_state, init_state, state_shardings
from jax_densevit.training.step import make_train_step

FOLDER = Path(__file__).parent.parent / "configs"
ROWS = tuple(f"{decoder}_{size}" for decoder in ("naive", "pup", "mla") for size in ("large", "base", "deit"))
# Config: (number of classes, arguments for full-size models, arguments for quick ones).
SETR = (*ROWS, "naive_large,mmseg", "pup_base,mmseg,multiscale", "mla_large,mmseg")
CONFIGS = {
    "quickstart": (11, ("",), ("quick",)),
    "nuclei": (2, ("", "scratch"), ("scratch,quick",)),
    "own_folder": (2, ("", "unet", "setr"), ("quick", "setr,quick")),
    "colorization/sample_photos": (3, ("", "lab"), ("quick",)),
    "colorization/photo_folder": (3, ("", "lab", "study"), ("lab,quick", "study,quick")),
    "coltran/colorizer": (1, ("", "base", "s", "small,cifar10", "photos"), ("base,quick",)),
    "coltran/color_upsampler": (1, ("", "small,photos", "cifar10"), ("quick",)),
    "coltran/spatial_upsampler": (1, ("", "small,samples"), ("quick",)),
    "instances/digits_easy": (10, ("", "token", "box", "published", "small"), ("quick", "box,quick")),
    "instances/digits_hard": (10, ("", "box", "unet"), ("token,quick", "unet,quick")),
    "instances/nuclei": (2, ("",), ("quick",)),
    "instances/cityscapes_unet": (8, ("", "bert"), ("quick",)),
    "instances/coco": (81, ("", "panoptic"), ("quick",)),
    "seq2seg/cityscapes": (34, ("", "skip", "no_skip", "unet"), ("no_skip,quick", "unet,quick")),
    "scaling": (11, ("", "setr"), ()),
    "setr/ade20k": (150, ("", *SETR, "160k"), ("quick", "naive_deit,mmseg,multiscale,quick")),
    "setr/cityscapes": (19, ("", *ROWS, "40k", "80k", "100k"), ("mla_base,quick",)),
    "vitseg/cityscapes": (19, ("", "grid", "rows", "spiral"), ("quick", "spiral,quick")),
    "vitseg/digits": (11, ("", "grid", "spiral"), ("rows,quick",)),
    "setr/pascal_context": (60, ("", *ROWS, "80k", "multiscale"), ("mla_large,mmseg,quick",)),
}
FULL = [(name, arg) for name, (_, args, _) in CONFIGS.items() for arg in args]
QUICK = [(name, arg) for name, (_, _, args) in CONFIGS.items() for arg in args]


def read(name, arg=""):
    return read_config(f"{FOLDER / name}.py" + (f":{arg}" if arg else ""))


def test_every_config_is_in_the_table_above():
    files = {
        str(p.relative_to(FOLDER).with_suffix("")) for p in FOLDER.rglob("*.py") if "def get_config" in p.read_text()
    }
    assert files == set(CONFIGS) | {"study"}  # several experiments in one: tests/test_study.py


@pytest.mark.parametrize("name", CONFIGS)
def test_the_header_says_what_a_user_wants_to_know(name):
    text = (FOLDER / f"{name}.py").read_text()
    header = text.split('"""')[1]
    for field in ("Command:", "Words:", "Hardware:", "Expected:", "Run here:"):
        assert field in header, f"{name} lacks {field}"
    assert f"--config=configs/{name}.py" in header
    with pytest.raises(UserError, match="no argument 'wrong'"):
        read(name, "wrong")
    # Rows are written as {a,b}_{c,d}; every other word as it is.
    words = {word for arg in (*CONFIGS[name][1], *CONFIGS[name][2]) for word in arg.split(",") if word}
    for word in words - set(ROWS):
        assert re.search(rf"\b{word}\b", header), f"the header of {name} does not mention {word!r}"


@functools.cache
def abstract(model):
    """Shapes of the parameters, and of the output for one training crop of the model's size."""
    side = model.image_size if hasattr(model, "image_size") else 256
    height, width = side if isinstance(side, tuple) else (side, side)
    inputs = example_inputs(model, (height, width))
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), *x), inputs)
    output = jax.eval_shape(lambda v, x: model.apply(v, *x), variables, inputs)
    return variables["params"], output


@pytest.mark.parametrize(("name", "arg"), FULL)
def test_full_size(name, arg):
    classes = CONFIGS[name][0]
    config = read(name, arg)
    info = DataInfo(name, tuple(str(k) for k in range(classes)), tuple((k, k, k) for k in range(classes)))
    options = {**config.task.to_dict()}
    task = create_task(options.pop("name"), info, **options)
    for evaluator in config.eval.values():
        decode = {**config.task.to_dict(), **evaluator.decode.to_dict()}
        create_task(decode.pop("name"), info, **decode)
    sized = {"num_classes": task.num_outputs} if "num_classes" in find_model(config.model.name).options else {}
    model = create_model(**config.model.to_dict(), **sized)
    params, output = abstract(model)
    if isinstance(output, QueryOutput):
        assert output.class_logits.shape[-1] == task.num_outputs + 1 and output.mask_logits.dtype == jnp.float32
    else:
        assert output.logits.shape[-1] == task.num_outputs and output.logits.dtype == jnp.float32
    make_optimizer(config.optimizer, params, config.steps)  # multipliers match, the warm-up fits
    height, width = tuple(config.data.crop) if all(config.data.crop) else config.data.train.size
    assert find_model(config.model.name).macs(model, (height, width)) > 0


@pytest.mark.parametrize("name", ["color_upsampler", "spatial_upsampler", "colorizer"])
def test_the_work_of_training_is_counted_for_what_is_trained(name):
    """ColTran's upsamplers train one channel of three, and its first stages see less than the crop."""
    experiment = build(read(f"coltran/{name}", "quick"), jax.devices()[:1])
    whole = find_model(experiment.config.model.name).macs(experiment.model, experiment.task.image_size)
    assert experiment.macs() == (whole if name == "colorizer" else whole // 3)


@pytest.mark.parametrize(("name", "arg"), QUICK)
def test_one_real_step_at_quick_size(name, arg):
    config = read(name, arg)
    experiment = build(config, jax.devices()[:1])  # on one device it compiles fastest
    stream = experiment.train_stream(0)
    batch = next(iter(stream))
    stream.close()
    batch = put_batch(batch, experiment.mesh)
    task, model, mesh = experiment.task, experiment.model, experiment.mesh
    ema = config.ema > 0
    optimizer, schedule = experiment.make_optimizer(abstract_parameters(model, task, batch))
    shardings = state_shardings(abstract_state(model, task, optimizer, batch, ema=ema), mesh, config.sharding_rules)
    state = init_state(model, task, optimizer, batch, shardings, seed=config.seed, ema=ema)
    before = jax.device_get(state.params)
    step = make_train_step(
        model, task, optimizer, schedule, mesh=mesh, shardings=shardings, augment=experiment.augment, ema=config.ema
    )
    state, numbers = step(state, batch)
    assert bool(numbers["finite"]) and float(numbers["loss"]) > 0 and float(numbers["grad_norm"]) > 0
    after = jax.device_get(state.params)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    assert any(jax.tree.leaves(changed))
    for evaluator in experiment.evaluators:
        assert evaluator.source.info.classes == experiment.info.classes
