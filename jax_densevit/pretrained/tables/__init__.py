"""Tables of names, one file per family: theirs, ours, and how the numbers lie."""

from jax_densevit.pretrained.tables import coltran, convolutional, dpt, efficientnet_lite, inception, setr, study, vit
from jax_densevit.pretrained.tables.table import Source

SOURCES: dict[str, Source] = {
    "vit_npz": vit.VIT_NPZ,
    "timm_vit": vit.TIMM_VIT,
    "deit": vit.DEIT,
    "hf_vit": vit.HF_VIT,
    "setr": setr.SETR,
    "mmseg_setr": setr.MMSEG_SETR,
    "uformer": convolutional.UFORMER,
    "dpt": dpt.DPT,
    "hf_dpt": dpt.HF_DPT,
    "unet": convolutional.UNET,
    "axial": convolutional.AXIAL,
    "study": study.STUDY,
    "coltran": coltran.COLTRAN,
    "efficientnet_lite": efficientnet_lite.EFFICIENTNET_LITE,
    "inception_fid": inception.INCEPTION_FID,
}
