import numpy as np
import pytest

from mmvig.datasets.shapes import CLASSES, MIN_VISIBLE, OUTLINES, PALETTE, draw_scene

HEIGHT, WIDTH = 160, 192


def scenes(count: int) -> list:
    return [draw_scene(np.random.default_rng([0, 0, i]), HEIGHT, WIDTH) for i in range(count)]


def test_same_state_same_scene_other_state_another():
    first, again = (draw_scene(np.random.default_rng(7), HEIGHT, WIDTH) for _ in range(2))
    other = draw_scene(np.random.default_rng(8), HEIGHT, WIDTH)
    assert first.labels == again.labels
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.masks, again.masks)
    assert not np.array_equal(first.image, other.image)


def test_version_1_draws_these_classes():
    """What a seed gives changes only together with `shapes_files.VERSION`."""
    from mmvig.datasets.shapes_files import VERSION

    drawn = [[CLASSES[label] for label in scene.labels] for scene in scenes(3)]
    assert VERSION == 1
    assert drawn == [
        ['star', 'heart', 'triangle', 'cross', 'cross'],
        ['circle', 'crescent', 'triangle', 'square'],
        ['ring', 'circle'],
    ]


def test_masks_are_disjoint_visible_and_large_enough_to_learn():
    sides = []
    for scene in scenes(60):
        assert scene.image.shape == (HEIGHT, WIDTH, 3)
        assert scene.image.dtype == np.uint8
        assert 1 <= len(scene.labels) == len(scene.masks) <= 5
        assert np.sum(scene.masks, axis=0).max() == 1
        sides += [np.sqrt(mask.sum()) for mask in scene.masks]
    assert min(sides) > 18
    assert np.median(sides) > 30


def test_classes_are_balanced_and_objects_overlap():
    drawn = scenes(150)
    counts = np.bincount(np.concatenate([scene.labels for scene in drawn]), minlength=len(CLASSES))
    assert counts.min() > 0.5 * counts.mean()
    # Somewhere a mask touches another: its pixels, moved by one, meet the neighbour's.
    touching = sum(
        any(
            (np.roll(first, 1, axis=axis) & second).any()
            for first in scene.masks
            for second in scene.masks
            if first is not second
            for axis in (0, 1)
        )
        for scene in drawn
    )
    assert touching > 0.3 * len(drawn)


@pytest.mark.parametrize('label', range(len(CLASSES)), ids=CLASSES)
def test_outline_is_centred_and_about_two_units_wide(label: int):
    points = OUTLINES[label]()[0]
    extent = np.ptp(points, axis=0)
    assert np.all(extent > 1.5), extent
    assert np.all(extent < 2.4), extent
    assert np.abs(points).max() < 1.6
    assert np.abs((points.max(0) + points.min(0)) / 2).max() < 0.4


def test_one_outline_and_colour_a_class():
    assert len(set(CLASSES)) == len(OUTLINES) == len(set(PALETTE)) == len(CLASSES)
    assert 0 < MIN_VISIBLE < 1
