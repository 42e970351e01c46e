"""From images to batches: which images in which order, decoded ahead by worker processes."""
import atexit
import functools
import hashlib
import multiprocessing
import signal
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader

from engine.devices import cores


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(step, n, batch, seed):
    """The images of a step: every epoch is a fresh shuffle, laid end to end. -> (batch,) int64"""
    places = np.arange(step * batch, (step + 1) * batch)
    epochs = places // n
    return np.concatenate([epoch_order(n, seed, epoch)[places[epochs == epoch] % n]
                           for epoch in np.unique(epochs)])


class Crops:
    """Image files as DataLoader wants them; an index is (image, seeds of its crops)."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, index):
        return self.images.crops(*index)


def stack(arrays):
    return torch.from_numpy(np.stack(arrays))


def ignore_signals(worker):
    """Ctrl-C and SIGTERM often reach every process at once. A loading worker leaves them to the
    process that it works for, which still needs its images to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@functools.cache                                           # register it once
def kill_workers_at_exit():
    """A process that fails while images are being loaded would wait for its workers for ever:
    Python ends them with SIGTERM, which they ignore."""
    def kill():
        if hasattr(signal, "SIGCHLD"):                     # torch would report it
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
    atexit.register(kill)


def crop_batches(images, batches, workers):
    """Each file is decoded once for all its crops. batches: lists of (image, seeds of its crops)
    -> uint8 tensors (B, crops, H, W, 3), in order"""
    kill_workers_at_exit()
    yield from DataLoader(Crops(images), batch_sampler=batches, collate_fn=stack,
                          num_workers=min(workers, cores()),
                          worker_init_fn=ignore_signals)
    if skipped := images.skipped():
        print(f"{skipped:,} of {len(images):,} images skipped: others of their class stand in for "
              "them", file=sys.stderr)


def picture_batches(images, batches, workers):
    """batches: lists of (image, seed of its crop) -> uint8 tensors (B, H, W, 3), in order. Images
    in memory, a GPU's too, are not cropped."""
    if torch.is_tensor(images):
        for batch in batches:
            rows = torch.tensor([i for i, _ in batch])
            rows = rows.pin_memory() if images.is_cuda else rows     # or the GPU is waited for
            yield images[rows.to(images.device, non_blocking=True)]
    elif isinstance(images, np.ndarray):
        for batch in batches:
            yield torch.from_numpy(images[[i for i, _ in batch]])
    else:
        for crops in crop_batches(images, ([(i, [seed]) for i, seed in batch]
                                           for batch in batches), workers):
            yield crops[:, 0]


def to_float(images):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]"""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def rows_of(n, count):
    """Up to `count` of n rows, always the same ones, in rising order. They are drawn at random:
    in a sorted data set every tenth image may be of one class."""
    return np.sort(np.random.default_rng(0).permutation(n)[:count])


def sample_of(images, count):
    """The images of these rows. -> uint8 tensor (n, H, W, 3)"""
    return stack([images[int(i)] for i in rows_of(len(images), count)])


def image_fingerprint(images):
    """A short name for these images: a hash of all bytes in memory; of files, a hash of all names
    and of the pixels of twenty."""
    digest = hashlib.sha256(images.tobytes() if isinstance(images, np.ndarray)
                            else images.names + sample_of(images, 20).numpy().tobytes())
    return f"{len(images)}-{digest.hexdigest()[:16]}"


def per_pass(side):
    """How many images to encode at once: about a megapixel, whatever their size."""
    return max(1, min(250, 2 ** 20 // side ** 2))
