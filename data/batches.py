"""From images to batches: which images in which order, decoded ahead."""
import functools
import hashlib
import os
import signal
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(step, n, batch, seed):
    """The pictures of a step: epochs are fresh shuffles, laid end to end. -> (batch,) int64"""
    at = np.arange(step * batch, (step + 1) * batch)
    order = [epoch_order(n, seed, e)[at[at // n == e] % n] for e in np.unique(at // n)]
    return np.concatenate(order)


class Crops:
    """A folder's pictures as DataLoader wants them; an index is (picture, seeds of its crops)."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, index):
        return self.images.crops(*index)


def stack(crops):
    return torch.from_numpy(np.stack(crops))


def ignore_signals(worker):
    """Ctrl-C and SIGTERM often reach every process at once. A loading worker leaves them to the
    process that it works for, which still needs its pictures to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def crop_batches(images, batches, workers):
    """Decode picture files ahead, in workers, each file once for all its crops. batches: lists of
    (picture, seeds of its crops), any number -> uint8 (B, crops, H, W, 3), in order"""
    yield from DataLoader(Crops(images), batch_sampler=batches, collate_fn=stack,
                          num_workers=min(workers, os.cpu_count() or 1),
                          worker_init_fn=ignore_signals)
    if skipped := images.skipped():
        print(f"{skipped:,} of {len(images):,} pictures skipped: others of their class stand in "
              "for them", file=sys.stderr)


def picture_batches(images, batches, workers):
    """batches: lists of (picture, crop seed), any number -> uint8 tensors (B, H, W, 3), in order.
    Pictures in memory, a GPU's too, are simply indexed."""
    if torch.is_tensor(images):
        for batch in batches:
            rows = torch.tensor([i for i, _ in batch])
            rows = rows.pin_memory() if images.is_cuda else rows     # or the GPU is waited for
            yield images[rows.to(images.device, non_blocking=True)]
    elif isinstance(images, np.ndarray):
        for batch in batches:
            yield torch.from_numpy(images[[i for i, _ in batch]])
    else:
        wanted = ([(i, [seed]) for i, seed in batch] for batch in batches)
        for crops in crop_batches(images, wanted, workers):
            yield crops[:, 0]


def to_float(images):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]"""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def sample_of(images, count):
    """Up to `count` pictures, always the same ones. -> uint8 tensor (n, H, W, 3)"""
    return stack([images[int(i)] for i in rows_of(len(images), count)])


def in_parts(images, rows):
    """The pictures of these rows, a few at a time. -> uint8 tensors (n, H, W, 3)"""
    for part in torch.from_numpy(rows).split(per_pass(len(images[0]))):
        yield stack([images[int(i)] for i in part])


def image_fingerprint(images):
    """A short name for these pictures: of all bytes in memory; of files, from all names and the
    pixels of twenty."""
    digest = hashlib.sha256(images.tobytes() if isinstance(images, np.ndarray)
                            else images.names + sample_of(images, 20).numpy().tobytes())
    return f"{len(images)}-{digest.hexdigest()[:16]}"


def rows_of(n, count):
    """Which rows `sample_of` takes: at random, as every 8th or 10th picture may be of one class."""
    return np.sort(np.random.default_rng(0).permutation(n)[:count])


def per_pass(side):
    """How many pictures to encode at once: about a megapixel, whatever their size."""
    return max(1, min(250, 2 ** 20 // side ** 2))
