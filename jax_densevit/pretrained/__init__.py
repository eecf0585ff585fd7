"""Published weights in: files to arrays (`read`), arrays to a model's variables (`convert`), by tables of names.

variables = convert(read("setr_pup.pth"), "setr", create_model("setr_pup", num_classes=19, image_size=768))
"""

from jax_densevit.pretrained.convert import Report, check, convert, restore_names
from jax_densevit.pretrained.read import Contents, contents, read
from jax_densevit.pretrained.tables import SOURCES

__all__ = ["SOURCES", "Contents", "Report", "check", "contents", "convert", "read", "restore_names"]
