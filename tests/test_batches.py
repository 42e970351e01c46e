"""Batches: every image once an epoch, shuffled, decided by seed and step alone."""
import itertools
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY
from hypothesis import given
from hypothesis import strategies as st

from data import batches, registry


@given(n=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 5))
def test_every_image_comes_once_per_epoch_as_seed_and_step_alone_decide(n, batch, seed):
    steps = range(-(-3 * n // batch))
    drawn = [batches.batch_indices(step, n, batch, seed) for step in steps]
    for step in steps:
        batches.epoch_order.cache_clear()
        assert np.array_equal(batches.batch_indices(step, n, batch, seed), drawn[step])
    order = np.concatenate(drawn)
    assert len(order) == len(steps) * batch and order.dtype.kind == "i"
    for epoch in range(3):
        assert sorted(order[epoch * n:(epoch + 1) * n]) == list(range(n))


def test_the_images_are_shuffled_differently_in_every_epoch_and_for_every_seed():
    epochs = [batches.batch_indices(e, 500, 500, seed) for seed in (0, 1) for e in range(3)]
    for one, other in itertools.combinations([*epochs, np.arange(500)], 2):
        assert (one == other).mean() < 0.05


def test_the_held_out_sample_is_not_of_the_first_classes_alone():
    """Folders list their images class by class, so the first rows are of a few classes."""
    rows = batches.rows_of(5000, 2000)
    assert len(set(rows)) == 2000 and 2300 < rows.mean() < 2700 and rows.max() > 4900


@pytest.mark.slow
def test_a_process_that_ends_while_images_are_being_loaded_does_not_wait_for_its_workers():
    """They ignore the SIGTERM with which Python ends them; what it prints is its own error."""
    code = """
import numpy as np
from data import batches
class Files:
    def crops(self, i, seeds):
        return np.zeros((len(seeds), 8, 8, 3), np.uint8)
loading = batches.crop_batches(Files(), [[(i, [0])] for i in range(100)], 2)
next(loading)
raise ValueError("a bug")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                          timeout=60)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "ValueError: a bug"


def test_a_data_set_from_outside_is_one_line_in_the_table(cli, monkeypatch):
    """Nothing else knows the data sets: a run trains on a new one by its name."""
    def load(split, *, data_dir, size):
        images = np.random.default_rng(len(split)).integers(0, 256, (12, size, size, 3), np.uint8)
        return images, np.arange(12) % 2, ["heads", "tails"]
    monkeypatch.setitem(registry.DATASETS, "coins", registry.Dataset(load, judge_steps=5))
    options = [option if option != "24" else "2" for option in TINY]
    result = cli("05_train.py", "--dataset", "coins", *options, "--out", "run")
    assert result.status == 0 and "coins: 12 " in result.out and "2 classes" in result.out, result
