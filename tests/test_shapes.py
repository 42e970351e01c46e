"""The built-in images: drawn from (seed, split, index) alone, at any size, the same everywhere."""
import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_folder import refusal

from data import shapes


@given(rows=st.lists(st.integers(0, 10**6), min_size=2, max_size=5, unique=True),
       seed=st.integers(0, 3), size=st.sampled_from([16, 32, 50]))
def test_an_image_depends_on_its_seed_split_and_index_alone(rows, seed, size):
    together, labels = shapes.draw(rows, size=size, seed=seed)
    others = [shapes.draw(rows, split="test", size=size, seed=seed)[0],
              shapes.draw(rows, size=size, seed=seed + 1)[0]]
    for i, row in enumerate(rows):
        alone, label = shapes.draw([row], size=size, seed=seed)
        assert (alone[0] == together[i]).all() and label[0] == labels[i] == row % 10
        assert all((images[i] != together[i]).any() for images in others)


def test_the_images_have_not_changed_and_have_the_promised_form():
    """The shipped checkpoint was trained on exactly these: change a figure and it is worthless."""
    images, labels, names = shapes.load("train", count=1_000)
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "fb82b4b4f86d4efb"
    assert images.shape == (1_000, 32, 32, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and np.bincount(labels).tolist() == [100] * 10
    assert len({image.tobytes() for image in images}) == 1_000 and len(set(names)) == 10


def test_the_same_image_at_another_size_is_the_same_image():
    small, large = (shapes.draw(np.arange(10), size=size)[0] for size in (32, 128))
    pooled = large.reshape(10, 32, 4, 32, 4, 3).mean(axis=(2, 4))
    assert abs(pooled - small).mean() < 0.5  # of 255: only the edges are sampled differently


def test_bad_requests_get_one_line():
    for wrong in ({"split": "valid"}, {"split": "test", "size": 8},
                  {"split": "test", "size": 512}, {"split": "test", "count": 0}):
        refusal(lambda: shapes.load(**wrong), "shapes")
