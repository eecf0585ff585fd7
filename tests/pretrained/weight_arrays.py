"""Arrays of every type and layout, and writers of PyTorch's two kinds of files."""

import ml_dtypes
import numpy as np
import pytest
from torch_writer import write_legacy, write_zip

from jax_densevit.errors import UserError
from jax_densevit.pretrained import read

RNG = np.random.default_rng(0)
WRITERS = {"zip": write_zip, "legacy": write_legacy}
ARRAYS = {
    "weight": RNG.normal(size=(3, 4, 5)).astype(np.float32),
    "turned": RNG.normal(size=(6, 2)).astype(np.float32).T,
    "permuted": RNG.normal(size=(2, 3, 4, 5)).astype(np.float64).transpose(3, 1, 0, 2),
    "half": RNG.normal(size=7).astype(np.float16),
    "brain": RNG.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
    "counter": np.array(12, np.int64),
    "flags": np.array([True, False]),
    "bytes": np.arange(5, dtype=np.uint8),
    "nothing": np.zeros((0, 3), np.float32),
}


def check(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def refuse(path, message):
    """One sentence with the file's name, and nothing beside the file afterwards."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    text = str(caught.value)
    assert str(path.parent) in text and "\n" not in text
    assert sorted(path.parent.iterdir()) == before
    return text
