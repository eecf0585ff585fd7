"""Objects of id maps in slots, against a slow walk over the picture."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_densevit.data.source import CROWD, DataInfo
from jax_densevit.errors import UserError
from jax_densevit.tasks.objects import ObjectClasses, boxes_of, count_objects, find_objects, masks_of, shares, void_of

INFO = DataInfo("toy", ("background", "cat", "dog", "sky"), things=("cat", "dog"))
KINDS = ObjectClasses.of(INFO, panoptic=True)
FIND = jax.jit(find_objects, static_argnums=(1, 2), static_argnames="crowds")


def batch_of(seed, batch=2, size=(9, 11)):
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), (batch, *size), p=(0.2, 0.3, 0.2, 0.2, 0.1))
    instances = rng.choice(np.array([0, 1, 2, 7, 300, CROWD - 1, CROWD, CROWD + 5, 65_535], np.uint16), labels.shape)
    return {"labels": labels, "instances": instances}


def slow(labels, instances, crowds):
    """{key: (pixels, class, crowd)} of one picture."""
    found = {}
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            label, number = int(labels[y, x]), int(instances[y, x])
            if label in (0, 255):
                continue
            if label == 3:
                key, crowd = "stuff", False
            else:
                crowd = number == 0 or number >= CROWD
                key = f"crowd of {label}" if number == 0 else number
            if crowds or not crowd:
                found.setdefault(key, ([], [], crowd))
                found[key][0].append((y, x))
                found[key][1].append(label - 1)
    return {
        key: (frozenset(pixels), int(np.bincount(votes).argmax()), crowd)
        for key, (pixels, votes, crowd) in found.items()
    }


@pytest.mark.parametrize("crowds", [False, True])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_objects_are_those_of_a_slow_walk_and_the_largest_have_slots(crowds, seed):
    batch = batch_of(seed)
    few, all_ = FIND(batch, KINDS, 3, crowds=crowds), FIND(batch, KINDS, 16, crowds=crowds)
    for i in range(2):
        expected = slow(batch["labels"][i], batch["instances"][i], crowds)
        assert int(all_.found[i]) == int(all_.valid[i]) == len(expected) == int(few.found[i])
        assert int(count_objects(batch, KINDS, crowds=crowds)[i]) == len(expected)
        slots = np.asarray(all_.slots[i])
        mine = [
            (
                frozenset(map(tuple, np.argwhere(slots == s + 1).tolist())),
                int(all_.classes[i, s]),
                bool(all_.crowd[i, s]),
            )
            for s in range(len(expected))
        ]
        assert set(mine) == set(expected.values())
        areas = [len(pixels) for pixels, _, _ in mine]
        assert areas == sorted(areas, reverse=True)
        assert (np.asarray(all_.classes[i, len(expected) :]) == -1).all()
        kept = [int((np.asarray(few.slots[i]) == s + 1).sum()) for s in range(int(few.valid[i]))]
        assert kept == areas[:3]
        unknown = batch["labels"][i] == 255
        if not crowds:
            thing = np.isin(batch["labels"][i], (1, 2))
            unknown |= thing & ((batch["instances"][i] == 0) | (batch["instances"][i] >= CROWD))
        np.testing.assert_array_equal(all_.void[i], unknown)


def test_masks_stretch_over_what_the_model_covers():
    batch = batch_of(1)
    objects = FIND(batch, KINDS, 8)
    masks = np.asarray(masks_of(objects, (12, 12)))
    assert masks.shape == (2, 8, 12, 12) and not masks[:, :, 9:].any() and not masks[..., 11:].any()
    for s in range(8):
        np.testing.assert_array_equal(masks[:, s, :9, :11], np.asarray(objects.slots) == s + 1)
    assert not np.asarray(void_of(objects, (12, 12)))[:, 9:].any()
    cells = masks.reshape(2, 8, 3, 4, 3, 4).mean((3, 5))
    np.testing.assert_array_equal(shares(masks_of(objects, (12, 12)), (3, 3)), cells)
    np.testing.assert_allclose(
        shares(masks_of(objects, (12, 12)), (5, 5)).sum((2, 3)) / 25, cells.mean((2, 3)), atol=0.01
    )


def test_hidden_pixels_belong_to_an_object_where_they_are_known():
    instances = np.zeros((1, 4, 6), np.uint16)
    instances[0, :, :4], instances[0, :, 2:] = 1, 3
    amodal = np.zeros((1, 4, 6), np.uint16)
    amodal[0, :, :4] |= 1
    amodal[0, :, 2:] |= 4
    amodal[0, 0] |= 2  # of object 2 nothing is seen
    objects = find_objects(
        {"labels": np.ones_like(instances, np.uint8), "instances": instances, "amodal": amodal}, KINDS, 4
    )
    masks = np.asarray(masks_of(objects, (4, 6)))
    assert objects.number.tolist() == [[3, 1, 0, 0]] and int(objects.found[0]) == 2
    assert masks.sum((2, 3)).tolist() == [[16, 16, 0, 0]]
    assert masks[0, 1, :, :4].all() and (np.asarray(objects.slots) == 2).sum() == 8


def test_boxes_are_tight():
    masks = np.zeros((3, 8, 10), bool)
    masks[0, 2:5, 3:9] = masks[1, 7, 0] = True
    np.testing.assert_allclose(
        boxes_of(masks), [(0.6, 3.5 / 8, 0.6, 3 / 8), (0.05, 7.5 / 8, 0.1, 1 / 8), (0, 0, 0, 0)], atol=1e-6
    )


def test_which_classes_are_objects():
    assert ObjectClasses.of(INFO).names == ("cat", "dog") and KINDS.names == ("cat", "dog", "sky")
    assert KINDS.things == (True, True, False) and KINDS.labels == (1, 2, 3)
    assert ObjectClasses.of(INFO, ("sky",)).labels == (3,)
    assert ObjectClasses.of(DataInfo("d", ("background", "a", "b"))).names == ("a", "b")
    assert ObjectClasses.of(DataInfo("d", ("a", "b"))).labels == (0, 1)
    with pytest.raises(UserError, match="'cot'.*'cat'"):
        ObjectClasses.of(INFO, ("cot",))
    with pytest.raises(UserError, match="no class of objects"):
        ObjectClasses.of(DataInfo("d", ("background",)))
