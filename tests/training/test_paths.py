import numpy as np
import pytest

from jax_densevit.errors import UserError
from jax_densevit.training.paths import first_match, named_leaves

PATHS = ["encoder/block_0/kernel", "encoder/block_0/bias", "head/kernel"]


def test_named_leaves_keeps_the_order_of_the_tree():
    tree = {"b": {"kernel": np.zeros(2)}, "a": np.ones(3)}
    assert {name: leaf.shape for name, leaf in named_leaves(tree).items()} == {"a": (3,), "b/kernel": (2,)}


def test_the_first_pattern_found_anywhere_in_the_path_decides():
    assert first_match(["kernel$", "block_0"], PATHS, "field") == {PATHS[0]: 0, PATHS[1]: 1, PATHS[2]: 0}
    assert first_match([], PATHS, "field") == {}


@pytest.mark.parametrize(
    "patterns, message",
    [
        (["haed"], "'haed' matches no parameter.*encoder/block_0/kernel"),
        (["kernel", "head/kernel"], "'head/kernel' never decides"),
        (["("], "not a regular expression"),
        ([3], "not a regular expression"),
    ],
)
def test_a_pattern_without_effect_is_refused(patterns, message):
    with pytest.raises(UserError, match=f"field: .*{message}"):
        first_match(patterns, PATHS, "field")
