"""Of ImageNet's size, without ImageNet: what must not grow with the number of pictures."""
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import ROOT

from data import batches, folder

PICTURES, L = 1_281_167, 680


def test_names_and_orders_of_a_million_pictures_take_little_memory():
    """As strings in lists, names would take hundreds of megabytes, in every loading worker."""
    paths = [f"n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG" for i in range(PICTURES)]
    labels = [i // 1300 for i in range(PICTURES)]
    batches.epoch_order.cache_clear()
    tracemalloc.start()
    try:
        images = folder.FolderImages("/imagenet/train", paths, labels, 256)
        kept, most = tracemalloc.get_traced_memory()
        assert kept < 80e6 and most < 400e6
        del paths, labels
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        for step in (0, 5004, 5005, 10 ** 5, 10 ** 6):     # orders of five epochs
            at = batches.batch_indices(step, len(images), 256, 0)
            assert len(at) == 256 and 0 <= at.min() and at.max() < PICTURES
        kept, most = tracemalloc.get_traced_memory()
        assert kept - held < 50e6 and most - held < 100e6
    finally:
        tracemalloc.stop()
    assert images.path(1300 * 7 + 1) == "/imagenet/train/n00000007/n00000007_9101.JPEG"
    batches.epoch_order.cache_clear()


TRAIN = """
import sys, time
sys.path[:0] = sys.argv[1:3]
import numpy as np, torch
from importlib import import_module
from conftest import stage_of
m2, m4, m5 = map(import_module, ("02_multiscale_vqvae", "04_var_transformer", "05_train"))
torch.set_num_threads(1)
scales = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)

def anonymous():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0]) * 1024

def stage_on(path):
    old = stage_of("transformer", batch_size=64, steps=10 ** 6)
    tokens = np.load(path, mmap_mode="r")
    data = tokens, np.arange(tokens.shape[1]) % 3
    sizes = m4.VARConfig(num_classes=3, scales=scales, vocab_size=16, latent_dim=4, depth=1,
                         width=8, heads=1)
    tokenizer = m2.MultiScaleVQVAE(m2.TokenizerConfig(
        image_size=64, scales=scales, vocab_size=16, latent_dim=4, channels=8, groups=4,
        unshuffle=4)).eval().requires_grad_(False)
    return m5.TransformerStage(old.settings, old.processes, tokenizer, sizes,
                               dict(train=data, test=data), "abc")

stages = [stage_on(path) for path in sys.argv[3:5]]        # of many rows, of few
stage = stages[0]
m5.train_step(stage, stage.model, tuple(t[:8] for t in next(stage.batches(0))), 0.5)
before = anonymous()
for step, batch in zip(range(30), stage.batches(10 ** 5)):
    assert batch[0].shape == (64, 680)
    assert not m5.train_step(stage, stage.model, batch, 0.5).skipped
grown = anonymous() - before
times = []
for stage in stages:
    reader, seconds = stage.batches(0), []
    next(reader)                                           # draws the order of the epoch
    for _ in range(300):
        begin = time.perf_counter()
        next(reader)
        seconds.append(time.perf_counter() - begin)
    times.append(sorted(seconds)[100])                     # noise only ever adds
print(grown, *times)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux about memory")
def test_a_token_cache_of_imagenets_size_stays_on_the_disk_and_is_read_as_fast_as_a_small_one(
        tmp_path):
    """1.7 GB that take no room: a sparse file, whose rows are all zero."""
    for name, rows in (("large", PICTURES), ("small", 1000)):
        with open(tmp_path / f"{name}.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, dict(descr="<u2", fortran_order=False,
                                                            shape=(1, rows, L)))
            file.truncate(file.tell() + rows * L * 2)
    assert os.stat(tmp_path / "large.npy").st_size > 1.7e9
    result = subprocess.run(
        [sys.executable, "-c", TRAIN, str(ROOT), str(ROOT / "tests"), tmp_path / "large.npy",
         tmp_path / "small.npy"], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    grown, large, small = map(float, result.stdout.split())
    assert grown < 1e9, f"{grown / 1e6:.0f} MB more"
    # A bound that no noise reaches, and nobody who looks at more than the rows he needs keeps.
    assert large < small + 0.02, (large, small)
