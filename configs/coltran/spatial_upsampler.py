"""ColTran's spatial upsampler: from 64 x 64 pixels to 256 x 256, 150,000 steps of 32 pictures.

The paper's schedule; the published config allows 300,000 steps.

Command:   python -m jax_densevit.train --config=configs/coltran/spatial_upsampler.py --workdir=runs/coltran_spatial \
               --config.data.train.data_dir=/data/tensorflow_datasets
           Your own folder: --config=configs/coltran/spatial_upsampler.py:photos --config.data.train.root=/data/photos
Words:     small (half the width); imagenet (the default), photos (your folder), samples (photos that come with pip),
           quick (minutes on two cores; on samples unless photos is said too)
Hardware:  published on 16 TPUv2 chips, in float32; a step takes 0.14 PFLOP here, and as much as a third more to
           recompute layers. Less memory: --config.accumulate=4
Expected:  no bits per sub-pixel are published; all values alike are 8, which evaluations say too
Run here:  `photos,quick`, see docs/studies/coltran_flowers.md; the full recipe not yet.
"""

from jax_densevit.configuration import sibling

recipe = sibling(__file__, "recipe.py")


def get_config(arg=""):
    """The config; words as above."""
    return recipe.coltran(
        arg,
        stage="coltran_spatial_upsampler",
        sizes={"image_size": (256, 256), "coarse_size": (64, 64)},
        quick={"image_size": (64, 64), "coarse_size": (32, 32)},
        layers={"num_layers": 1},
        quick_steps=1000,
        steps=150_000,
        batch_size=32,
    )
