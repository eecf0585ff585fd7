"""ColTran's colorizer: coarse colors of 64 x 64 pixels, 450,000 steps of 224 pictures. One of three stages.

Command:   python -m jax_densevit.train --config=configs/coltran/colorizer.py --workdir=runs/coltran_colorizer \
               --config.data.train.data_dir=/data/tensorflow_datasets
           Your own folder: --config=configs/coltran/colorizer.py:photos --config.data.train.root=/data/photos
           Another set of TFDS: --config.data.train.dataset=NAME --config.eval.test.data.split=test
Words:     base (ColTran-B: gray conditions by addition only), s (ColTran-S: 28 x 28 pixels), small (half the width);
           imagenet (the default), cifar10 (32 x 32 pixels), photos (your folder), samples (photos that come with pip),
           quick (minutes on two cores; on samples unless photos is said too)
Hardware:  published on 16 TPUv2 chips, in float32; a step takes 0.22 PFLOP here, and as much as a third more to
           recompute layers. Less memory: --config.accumulate=4
Expected:  no bits per pixel are published. FID of 5000 validation pictures after all three stages, Kumar et al. 2021:
           19.37 (base 19.98, ColTran-S 22.06; the truth itself 14.68)
Run here:  `photos,quick`, see docs/studies/coltran_flowers.md; the full recipe not yet.
"""

from jax_densevit.configuration import sibling

recipe = sibling(__file__, "recipe.py")


def get_config(arg=""):
    """The config; words as above."""
    return recipe.coltran(
        arg,
        stage="coltran_colorizer",
        sizes={"image_size": (64, 64)},
        quick={"image_size": (32, 32)},
        layers={"encoder_layers": 2, "outer_layers": 1, "inner_layers": 1},
        quick_steps=2000,
        steps=450_000,
        batch_size=224,
        variants={"base": "ColTran-B", "s": "ColTran-S"},
    )
