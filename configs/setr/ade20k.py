"""SETR on ADE20K (150 classes): crops of 512, 160,000 steps of 16 images.

Command:   python -m jax_densevit.train --config=configs/setr/ade20k.py:pup_large --workdir=runs/setr_ade20k \
               --config.data.train.root=/data/ADEChallengeData2016 --config.init.workdir=/weights/vit_large_p16_384
Words:     {naive,pup,mla}_{large,base,deit}, 160k, mmseg, multiscale, quick; without a row, pup_large
Hardware:  published on 8 V100s; a TPU v3-8 or one 80 GB GPU holds it
Expected:  val mIoU, single scale / multiple scales and flip, from ImageNet-21k weights (DeiT: ImageNet-1k),
           Zheng et al. 2021 Table 4:
             naive_large 48.06 / 48.80   pup_large 48.58 / 50.09   mla_large 48.64 / 50.28
             pup_deit    46.34 / 47.30   mla_deit  46.15 / 47.71
           mmsegmentation's own trainings (`mmseg`): naive 48.28 / 49.56, pup 48.24 / 49.99, mla 47.54 / 49.37.
           Runs differ by about 0.5; 1.0 below is a reason to look.
Run here:  only `quick`; the full recipe not yet.
"""

from jax_densevit.configuration import sibling

recipe = sibling(__file__, "recipe.py")


def get_config(arg=""):
    """The config of one row of the table above."""
    return recipe.setr(
        arg,
        source="ade20k",
        root="data/ADEChallengeData2016",
        crop=512,
        stride=341,
        box=(2048, 512),
        batch_size=16,
        schedules={"160k": 160_000},
        learning_rates={"naive": 0.01, "pup": 0.001, "mla": 0.001},
    )
