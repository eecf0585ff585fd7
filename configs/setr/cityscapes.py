"""SETR on Cityscapes: crops of 768, 80,000 steps of 8 images.

Command:   python -m jax_densevit.train --config=configs/setr/cityscapes.py:pup_large --workdir=runs/setr_cityscapes \
               --config.data.train.root=/data/cityscapes --config.init.workdir=/weights/vit_large_p16_384
Words:     {naive,pup,mla}_{large,base,deit}, 40k | 80k | 100k, mmseg, multiscale, quick; without a row, pup_large
Hardware:  published on 8 V100s; a TPU v3-8 or one 80 GB GPU holds it
Expected:  val mIoU, single scale, 40k / 80k steps, from ImageNet-21k weights (DeiT: ImageNet-1k),
           Zheng et al. 2021 Table 2:
             naive_large 77.37 / 77.90   naive_base 75.54 / 76.25   naive_deit 77.85 / 78.66
             pup_large   78.39 / 79.34   pup_base   76.71 / 78.02   pup_deit   78.79 / 79.45
             mla_large   76.65 / 77.24   mla_base   75.60 / 76.87   mla_deit   78.04 / 78.98
           pup_large 80k with multiscale 82.15; pup_large 40k without config.init (random weights) 42.27.
           Runs differ by about 0.5; 1.0 below is a reason to look.
Run here:  only `quick`; the full recipe not yet.
"""

from jax_densevit.configuration import sibling

recipe = sibling(__file__, "recipe.py")


def get_config(arg=""):
    """The config of one row of the table above."""
    return recipe.setr(
        arg,
        source="cityscapes",
        root="data/cityscapes",
        crop=768,
        stride=512,
        box=(2049, 1025),
        batch_size=8,
        schedules={"80k": 80_000, "40k": 40_000, "100k": 100_000},
        learning_rates={"naive": 0.01, "pup": 0.01, "mla": 0.002},
    )
