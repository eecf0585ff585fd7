"""Hugging Face's `.safetensors`."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jax_densevit.pretrained.memory import check_room


def load(path: Path) -> dict[str, np.ndarray]:
    """Name -> array. The format has no checksums: a flipped bit among the values is not seen."""
    import ml_dtypes  # noqa: F401  registers bfloat16 and its kin with NumPy

    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            check_room(path, len(names), path.stat().st_size)
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
