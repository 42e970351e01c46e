"""From images to batches. Image files are decoded ahead of time by worker processes."""
import atexit
import hashlib
import multiprocessing
import signal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from engine.device import cores


def picture_batches(images, batches, workers):
    """batches: lists of (index of an image, seed of its crop), where -1 means the centre.
    -> uint8 tensors (B, H, W, 3), in order. Images in memory are not cropped."""
    if isinstance(images, np.ndarray):                     # in memory
        for batch in batches:
            yield torch.from_numpy(images[[i for i, seed in batch]])
    else:
        atexit.register(kill_workers)
        yield from DataLoader(images, batch_sampler=batches, worker_init_fn=ignore_signals,
                              num_workers=min(workers, cores()))


def ignore_signals(worker):
    """Ctrl-C and SIGTERM often reach all processes. The run needs its workers until it stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def kill_workers():
    """At exit, Python sends SIGTERM to its workers, which ignore it, and waits for them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)      # torch would report the kill
    for worker in multiprocessing.active_children():
        worker.kill()


def view_batches(images, view, rows_list, workers):
    """One view of the images in each of these arrays of rows: for files, view 0 is the centre
    and the others are random crops; for images in memory, see `view_of`.
    -> float tensors (B, 3, H, W) in [-1, 1]"""
    crops = ([(i, view - 1) for i in rows.tolist()] for rows in rows_list)
    in_memory = isinstance(images, np.ndarray)
    for rows, batch in zip(rows_list, picture_batches(images, crops, workers)):
        image = to_float(batch)
        yield view_of(image, view, rows, len(images)) if in_memory else image


def view_of(image, view, rows, n):
    """A view of images (B, 3, H, W), which are rows (B,) of a data set of n: odd views are
    mirrored, and from 2 on each image is shifted by its own number of pixels, up to a
    sixteenth of the side, and reflected at the border. -> (B, 3, H, W)"""
    image = image.flip(3) if view % 2 else image
    if view < 2:
        return image
    side = image.shape[-1]
    reach = side // 16
    # Drawn for all n, so that an image is shifted alike in every batch.
    shifts = np.random.default_rng(view).integers(0, 2 * reach + 1, (n, 2))[rows]
    padded = F.pad(image, (reach,) * 4, "reflect")
    return torch.stack([one[:, down:down + side, right:right + side]
                        for one, (down, right) in zip(padded, shifts)])


def to_float(images):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]"""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def rows_of(n, count):
    """Up to `count` of n rows, rising, drawn at random but always the same ones."""
    return np.sort(np.random.default_rng(0).permutation(n)[:count])


def sample_of(images, count):
    """The images of these rows -> uint8 tensor (count, H, W, 3)"""
    chosen = [images[int(i)] for i in rows_of(len(images), count)]
    return torch.from_numpy(np.stack(chosen))


def image_fingerprint(images):
    """-> a hash of all pixels or, for files, of all names and the pixels of twenty"""
    if isinstance(images, np.ndarray):
        data = images.tobytes()
    else:
        data = images.names.tobytes() + sample_of(images, 20).numpy().tobytes()
    return f"{len(images)}-{hashlib.sha256(data).hexdigest()[:16]}"


def per_pass(side):
    """How many images of this side to encode at once: about a megapixel."""
    return max(1, min(250, 2 ** 20 // side ** 2))
