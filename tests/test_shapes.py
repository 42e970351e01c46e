"""The built-in images: drawn from (seed, split, index) alone, at any size, the same everywhere."""
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_folder import refusal

from data import shapes


@given(rows=st.lists(st.integers(0, 10**6), min_size=1, max_size=5), seed=st.integers(0, 3),
       size=st.sampled_from([16, 32, 50]), split=st.sampled_from(["train", "test"]))
def test_an_image_depends_on_its_index_alone(rows, size, seed, split):
    together, labels = shapes.draw(rows, split=split, size=size, seed=seed)
    for i, row in enumerate(rows):
        alone, label = shapes.draw([row], split=split, size=size, seed=seed)
        assert (alone[0] == together[i]).all() and label[0] == labels[i] == row % 10


def test_the_images_have_not_changed_and_have_the_promised_form():
    """The shipped checkpoint was trained on exactly these: change a figure and it is worthless."""
    images, labels, names = shapes.load("train", count=1_000)
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "fb82b4b4f86d4efb"
    assert images.shape == (1_000, 32, 32, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and np.bincount(labels).tolist() == [100] * 10
    assert len(names) == len(set(names)) == 10
    # A figure on a paler ground: no image is flat, and none runs out of range at either end.
    assert images.std(axis=(1, 2, 3)).min() > 10 and 150 < images.mean() < 230


def test_no_image_is_drawn_twice_and_splits_and_seeds_differ():
    sets = [shapes.load("train", count=2_000), shapes.load("test", count=1_000),
            shapes.load("train", count=500, seed=1), shapes.load("test", count=500, seed=1)]
    seen = {hashlib.sha256(image.tobytes()).digest() for images, _, _ in sets for image in images}
    assert len(seen) == 4_000


def test_the_same_image_at_another_size_is_the_same_image():
    small, _ = shapes.draw(np.arange(10), size=32)
    large, _ = shapes.draw(np.arange(10), size=128)
    pooled = large.reshape(10, 32, 4, 32, 4, 3).mean(axis=(2, 4))
    assert abs(pooled - small).mean() < 2  # of 255: only the edges are sampled differently


@pytest.mark.parametrize("wrong", [{"split": "valid"}, {"split": "test", "size": 8},
                                   {"split": "test", "size": 512}, {"split": "test", "count": 0}])
def test_bad_requests_get_one_line(wrong):
    refusal(lambda: shapes.load(**wrong), "shapes")
