"""ColTran's color upsampler: from 3 bits a channel to 8 at 64 x 64 pixels, 300,000 steps of 768 pictures.

Command:   python -m jax_densevit.train --config=configs/coltran/color_upsampler.py --workdir=runs/coltran_color \
               --config.data.train.data_dir=/data/tensorflow_datasets
           Your own folder: --config=configs/coltran/color_upsampler.py:photos --config.data.train.root=/data/photos
           Another set of TFDS: --config.data.train.dataset=NAME --config.eval.test.data.split=test
Words:     small (half the width); imagenet (the default), cifar10 (32 x 32 pixels), photos (your folder), samples
           (photos that come with pip), quick (minutes on two cores; on samples unless photos is said too)
Hardware:  published on 16 TPUv2 chips, in float32; a step takes 0.25 PFLOP here, and as much as a third more to
           recompute layers. Less memory: --config.accumulate=4
Expected:  no bits per sub-pixel are published; all values of a coarse one alike are 5, which evaluations say too
Run here:  `photos,quick`, see docs/studies/coltran_flowers.md; the full recipe not yet.
"""

from jax_densevit.configuration import sibling

recipe = sibling(__file__, "recipe.py")


def get_config(arg=""):
    """The config; words as above."""
    return recipe.coltran(
        arg,
        stage="coltran_color_upsampler",
        sizes={"image_size": (64, 64), "coarse_size": (64, 64)},
        quick={"image_size": (32, 32), "coarse_size": (32, 32)},
        layers={"num_layers": 2},
        quick_steps=1000,
        steps=300_000,
        batch_size=768,
    )
