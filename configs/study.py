"""The comparison study, on equal terms: U-Net, DPT, Axial transformer and Uformer on segmentation and colorization.

All four on crops of the same size and place, in the same order, with one optimizer whose rate is chosen for each of
them on validation; evaluation in evaluation mode, the best step kept, the test split measured once. Published sizes by
default: 31.0, 105.9, 19.9 and 20.6 million parameters.

Data:      segmentation: any source with labels, here Hypersim as the study (HDF5 files tone-mapped, at half size);
           colorization: a folder of photographs, here split into train, val and test by a hash of the names
Command:   python -m jax_densevit.study --config=configs/study.py --workdir=runs/study \
               --config.tasks.segmentation.data.train.root=/data/hypersim \
               --config.tasks.colorization.data.train.root=/data/VOC2012/JPEGImages
           python -m jax_densevit.study --config=configs/study.py:both,quick --workdir=runs/study_quick
           python -m jax_densevit.study --config=configs/study.py:both,nuclei,small --workdir=runs/study_small \
               --config.tasks.segmentation.data.train.root=/data/nuclei \
               --config.tasks.colorization.data.train.root=/data/flowers
Words:     both (default), segmentation, colorization; seq2seg, vitseg, setr (one more model each, SETR-PUP on B/16);
           nuclei (segmentation of an instance folder at 128x128 in place of Hypersim); skip (Seq2Seg with and without
           the sum over its hidden states, in place of all other models); small (the models of `quick` on crops of
           128x128 of the data named); quick (small models on digit scenes and sample photos)
Hardware:  full: a GPU with 40 GB; per model and task 30,000 steps of 16 crops of 256x256, of which Axial costs thirty
           times as much as a U-Net. quick: a laptop, two CPU cores, 2 GB
Expected:  full: unknown; the study itself compared unequal terms. quick: see docs/studies
Run here:  see docs/studies
"""

from jax_densevit.configuration import ConfigDict, choose, default_config, default_evaluator, words
from jax_densevit.studies.plan import default_model, default_study

TASKS = ("segmentation", "colorization")
EXTRA = ("seq2seg", "vitseg", "setr")
SKIP = ("seq2seg", "seq2seg_no_skip")


def get_config(arg=""):
    """The study: tasks, models, and the terms that are the same for all."""
    given = words(arg, "both", *TASKS, *EXTRA, "nuclei", "skip", "small", "quick")
    chosen = choose(given, "both", *TASKS)
    quick = "quick" in given
    small = quick or "small" in given
    study = default_study()
    for name in TASKS if chosen == "both" else (chosen,):
        study.tasks[name] = _segmentation(given, small) if name == "segmentation" else _colorization(small)
        if small:
            _minutes(study.tasks[name], 200 if quick else 300)
        if quick:
            _shipped(study.tasks[name], name)
    if small:
        study.learning_rates = (1e-3, 4e-3)
        study.probe = 0.125
        study.evaluations = 4
    crop = 64 if small else 128 if "nuclei" in given else 256
    models = ("unet", "dpt", "axial", "uformer", *(name for name in EXTRA if name in given))
    for name in SKIP if "skip" in given else models:
        study.models[name] = _model(name, small, crop)
    return study


def _model(name, small, crop):
    """One model: published, or small enough for two CPU cores and of similar cost."""
    seq2seg = {
        "image_size": crop,
        "hidden_size": 128,
        "num_layers": 4,
        "num_heads": 4,
        "mlp_size": 512,
        "patch_size": 8,
    }
    full, little, title, per_task = {
        "unet": ({"variant": "64"}, {"base": 12}, "U-Net", {}),
        "dpt": (
            {"variant": "base", "image_size": crop},
            {
                "hidden_size": 128,
                "num_layers": 4,
                "num_heads": 4,
                "mlp_size": 512,
                "patch_size": 8,
                "image_size": crop,
                "reassemble": (32, 48, 64, 96),
                "features": 32,
            },
            "DPT",
            {},
        ),
        # The study's two heads: 1x1 for colors, 3x3 for classes.
        "axial": (
            {},
            {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_size": 48, "reversible": False},
            "Axial Transformer",
            {"colorization": {"model": {"head_kernel": 1}}},
        ),
        "uformer": (
            {"variant": "S"},
            {"base": 8, "depths": (1,) * 9, "window": 8},
            "Uformer",
            {},
        ),
        "seq2seg": ({"variant": "skip", "image_size": crop}, seq2seg, "Seq2Seg", {}),
        "seq2seg_no_skip": (
            {"variant": "no_skip", "image_size": crop},
            {**seq2seg, "skip": False},
            "Seq2Seg, no skip",
            {},
        ),
        "vitseg": (
            {"variant": "grid", "image_size": crop},
            {
                "patch_size": 8,
                "image_size": crop,
                "projection_size": 120,
                "num_layers": 2,
                "num_heads": 4,
                "head_size": 32,
                "mlp_sizes": (256, 128),
                "feature_sizes": (128, 128),
                "token_features": 16,
                "decoder_projection": 64,
                "decoder_sizes": (128, 128),
            },
            "ViTSeg",
            {},
        ),
        "setr": (
            {"variant": "B/16", "image_size": crop},
            {
                "patch_size": 8,
                "hidden_size": 128,
                "num_layers": 4,
                "num_heads": 4,
                "mlp_size": 512,
                "head_channels": 48,
                "image_size": crop,
            },
            "SETR-PUP",
            {},
        ),
    }[name]
    entry = default_model()
    entry.title = title
    options = {k: v for k, v in full.items() if k != "variant"} | little if small else full
    registered = {"setr": "setr_pup", "seq2seg_no_skip": "seq2seg"}.get(name, name)
    entry.model = ConfigDict({"name": registered, **options})
    entry.per_task = ConfigDict(per_task)
    return entry


def _terms(config):
    """What is the same for both tasks and all models."""
    config.batch_size = 16
    config.steps = 30_000
    config.optimizer.name = "adamw"
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 1500
    config.optimizer.weight_decay = 0.02
    config.optimizer.clip_norm = 1.0
    config.checkpoint.every = 1000
    config.checkpoint.keep = 1


def _evaluators(config, options):
    """Validation and test, in windows of the size of the training crops: `options` say which."""
    for split in ("val", "test"):
        evaluator = default_evaluator()
        evaluator.data = ConfigDict({**options, "split": split})
        if "root" in config.data.train:
            # One flag moves all three: --config.tasks.<task>.data.train.root=...
            evaluator.data.root = config.data.train.get_ref("root")
        evaluator.batch_size = 16
        config.eval[split] = evaluator


def _segmentation(given, small):
    """Hypersim as the study: half of 1024x768, crops of 256x256, 40 classes; or nuclei."""
    config = default_config()
    # Only labelled pixels count, in the loss as in the scores.
    config.task = ConfigDict({"name": "segmentation", "denominator": "valid"})
    if "nuclei" in given:
        data, crop = {"name": "instance_folder", "root": "data/nuclei", "classes": ("background", "nucleus")}, 128
        windows = "tiles"  # all of a picture: there are few
    else:
        data, crop = {"name": "hypersim", "root": "data/hypersim", "size": (384, 512)}, 256
        windows = "centre_crop"
    crop = 64 if small else crop
    config.data.train = ConfigDict({**data, "split": "train"})
    config.data.crop = (crop, crop)
    config.data.flip = 0.5
    _terms(config)
    _evaluators(config, {**data, windows: (crop, crop)})
    config.checkpoint.best = "val/mIoU"
    return config


def _colorization(small):
    """Photographs, their RGB from their gray, Charbonnier."""
    config = default_config()
    # Inputs in [0, 1]: Uformer adds its input to its output in these units whatever they are, the others do not care.
    data = {"name": "photo_folder", "root": "data/photos", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    crop = 64 if small else 256
    config.task = ConfigDict({"name": "colorization", "target": "rgb", "gray": "bt601"})
    config.data.train = ConfigDict({**data, "split": "train"})
    config.data.crop = (crop, crop)
    config.data.flip = 0.5
    _terms(config)
    _evaluators(config, {**data, "centre_crop": (crop, crop)})
    config.checkpoint.best = "-val/charbonnier"
    return config


def _minutes(config, steps):
    """A run of minutes on two CPU cores."""
    config.steps = steps
    config.optimizer.warmup_steps = steps // 10
    config.log.every = 20
    config.checkpoint.every = steps // 2


def _shipped(config, task):
    """Data that comes with pip."""
    if task == "segmentation":
        data, more = {"name": "digit_scenes", "size": (64, 64), "digits": (2, 4), "scale": (20, 32)}, {"length": 128}
        config.data.flip = 0.0  # a mirrored digit is none
    else:
        # Photos of 192 pixels, so that a crop shows more than a texture; evaluated in all of their 64x64 windows.
        data, more = {"name": "sample_photos", "side": 192}, {"tiles": (64, 64)}
    config.data.train = ConfigDict({**data, "split": "train"})
    for split, evaluator in config.eval.items():
        evaluator.data = ConfigDict({**data, **more, "split": split})
