"""COCO's run lengths against pycocotools, both ways."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from jax_densevit.data.run_lengths import run_lengths


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)))
def test_small_masks(mask):
    expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert run_lengths(mask) == {"size": list(mask.shape), "counts": expected["counts"].decode()}


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 1])
def test_long_runs(share):
    mask = np.random.default_rng(0).random((700, 900)) < share
    encoded = run_lengths(mask)
    assert encoded["counts"] == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    # pycocotools takes the deprecated way from its own buffer to NumPy.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        np.testing.assert_array_equal(coco.decode(encoded), mask)
