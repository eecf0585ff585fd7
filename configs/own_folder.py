"""Your own images and masks: copy this file, name your folders and classes, train.

Command:   python -m jax_densevit.check_data --config=configs/own_folder.py
           python -m jax_densevit.train --config=configs/own_folder.py --workdir=runs/own
Words:     unet (default: a U-Net from scratch), setr (SETR-PUP on a ViT-B/16, to start from another run's weights),
           quick (steps of a second on digit scenes, to see that everything works)
Hardware:  unet: a GPU of 8 GB, or a night on a CPU; setr: a GPU of 24 GB
Expected:  depends on your data
Run here:  only `quick`, on digit scenes.
"""

from jax_densevit.configuration import ConfigDict, choose, default_config, default_evaluator, words

# <FOLDER>/train/images/a.jpg belongs to <FOLDER>/train/labels/a.png, and the same in <FOLDER>/val. Masks are PNG files
# whose pixel values are class numbers, 255 where nobody can tell.
FOLDER = "data/own"
# What the class numbers mean: 0 is the first name, 1 the second, ... check_data says which numbers your masks hold.
CLASSES = ("background", "object")
# Training pictures are squares of this many pixels, cut at random places; smaller images are padded. A multiple of 16,
# large enough that a person could name what is in it.
CROP = 256


def get_config(arg=""):
    """The config of a U-Net from scratch, or of SETR-PUP with the word `setr`."""
    given = words(arg, "unet", "setr", "quick")
    architecture = choose(given, "unet", "setr")
    # Every field of an experiment with its default; see jax_densevit/configuration.py for all of them.
    config = default_config()

    # --- the data ---
    # Masks of another kind need one more option here, for example
    #   threshold=128              soft masks from 0 to 255 in gray: 128 and above is class 1
    #   id_map={"7": 0, "8": 1}    other numbers than 0, 1, 2, ...
    #   palette=((0, 0, 0), ...)   masks in color: one RGB triple per class
    # and `list_file` picks examples by name, if train and val lie in one folder.
    config.data.train = _folder("train")
    config.data.crop = (CROP, CROP)
    # Before the crop, images shrink or grow at random by these factors, so that near and far objects are learned. The
    # box is (long side, short side); with images much larger than the crop, take a smaller box than their size.
    config.data.resize_box = (2 * CROP, 2 * CROP)
    config.data.resize_ratio = (0.5, 2.0)
    # Draw another crop while one class covers more than this share of it: keeps crops of nothing but background rare.
    config.data.max_class_ratio = 0.95
    # Half of the crops are mirrored, left to right.
    config.data.flip = 0.5
    # True where there is no up and down (aerial pictures, microscopes): upside down, and turned by quarters.
    config.data.vertical_flip = 0.0
    config.data.rotate90 = False
    # Change brightness, contrast, saturation and hue at random. Off where the color alone says what something is.
    config.data.photometric = True
    # "skip" leaves unreadable files out (and counts them) instead of stopping.
    config.data.on_bad = "fail"

    # --- the model ---
    if architecture == "unet":
        # 7.8 million parameters; base=64 is the U-Net of the paper, base=16 trains on a CPU.
        config.model = ConfigDict({"name": "unet", "base": 32})
    else:
        # image_size is the size of the position table, which is stretched to any picture. Keep that of the run whose
        # weights you start from.
        config.model = ConfigDict({"name": "setr_pup", "variant": "B/16", "image_size": 512, "dtype": "bfloat16"})
        # A ViT needs weights that have seen many pictures: the workdir of another run, e.g. of configs/setr/ade20k.py.
        # The classifiers are new, since your classes are.
        #   config.init.workdir = "runs/setr_ade20k"
        #   config.init.leave_out = (r"classifier",)

    # --- what is learned ---
    # "valid": the mean over labelled pixels. Rare classes can count more: class_weights=(1.0, 3.0).
    config.task = ConfigDict({"name": "segmentation", "denominator": "valid"})
    # Long enough that every image is seen some hundred times. Stop at any time: the same command goes on.
    config.steps = 20_000
    # As many as fit into memory. If 16 do not, accumulate=2 computes them in two parts with the same result.
    config.batch_size = 16
    config.accumulate = 1
    # The rate rises during the warm-up and then falls to 0 along a cosine.
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3 if architecture == "unet" else 1e-4
    config.optimizer.warmup_steps = 500
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    if architecture == "setr":
        # The new decoder learns faster than the encoder, which knows something already.
        config.optimizer.multipliers = ((r"^(decode_head|auxiliary_head_\d+)/", 10.0),)
    # Evaluate and keep a moving average of the last thousand steps or so: less noise, most often a better score.
    config.ema = 0.999

    # --- how it is measured ---
    evaluator = default_evaluator()
    evaluator.data = _folder("val")
    evaluator.every = 1000
    # One picture at a time, since their sizes may differ, in overlapping windows of the size seen in training.
    evaluator.batch_size = 1
    evaluator.decode = ConfigDict({"mode": "slide", "crop": CROP, "stride": CROP // 2})
    # Pictures are brought to the size around which training varied them; the answer has their own size again.
    evaluator.decode.base_size = config.data.resize_box
    config.eval.val = evaluator
    # The step with the best score is kept beside the newest; evaluate and predict take it.
    config.checkpoint.best = "val/mIoU"
    config.checkpoint.every = 1000

    if "quick" in given:
        _shrink(config, architecture)
    return config


def _folder(split):
    files = {"images": f"{FOLDER}/{split}/images", "labels": f"{FOLDER}/{split}/labels"}
    return ConfigDict({"name": "paired_folder", "classes": CLASSES, **files})


def _shrink(config, architecture):
    """Small enough for steps of a second, with scenes of digits instead of your folder."""
    scenes = {"name": "digit_scenes", "size": (64, 80), "length": 16}
    config.data.train = ConfigDict({**scenes, "split": "train"})
    config.data.crop = (32, 32)
    config.data.resize_box = (80, 64)
    if architecture == "unet":
        config.model.base = 4
    else:
        config.model.update(hidden_size=32, num_layers=4, num_heads=2, mlp_size=64, head_channels=16, image_size=32)
        config.model.dtype = "float32"
    config.steps = 2
    config.batch_size = 8
    config.optimizer.warmup_steps = 1
    config.eval.val.data = ConfigDict({**scenes, "split": "val", "length": 3})
    config.eval.val.every = 0
    config.eval.val.decode.update(crop=32, stride=24, base_size=(80, 64))
    config.checkpoint.every = 2
    config.log.every = 1
