"""SETR on Pascal Context (60 classes, background among them): crops of 480, 80,000 steps of 16 images.

Command:   python -m jax_densevit.train --config=configs/setr/pascal_context.py:mla_large --workdir=runs/setr_context \
               --config.data.train.root=/data/VOCdevkit --config.init.workdir=/weights/vit_large_p16_384
Words:     {naive,pup,mla}_{large,base,deit}, 80k, mmseg, multiscale, quick; without a row, pup_large
Hardware:  published on 8 V100s; a TPU v3-8 or one 80 GB GPU holds it
Expected:  val mIoU over 60 classes, single scale / multiple scales and flip, the authors' README:
             naive_large 52.89 / 53.61   pup_large 54.37 / 55.27   mla_large 55.01 / 55.83 (batch 8: 54.39 / 55.39)
             pup_deit    52.00 / 52.50   mla_deit  52.91 / 53.74
           Runs differ by about 0.5; 1.0 below is a reason to look.
Run here:  only `quick`; the full recipe not yet.
"""

from jax_densevit.configuration import sibling

recipe = sibling(__file__, "recipe.py")


def get_config(arg=""):
    """The config of one row of the table above."""
    return recipe.setr(
        arg,
        source="pascal_context",
        root="data/VOCdevkit",
        crop=480,
        stride=320,
        box=(520, 520),
        batch_size=16,
        schedules={"80k": 80_000},
        learning_rates={"naive": 0.01, "pup": 0.001, "mla": 0.001},
    )
