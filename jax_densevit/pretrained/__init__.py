"""Published weights in: files to arrays (`read`), arrays to a model's variables (`convert`), by tables of names."""

from jax_densevit.pretrained.read import Contents, contents, read

__all__ = ["Contents", "contents", "read"]
