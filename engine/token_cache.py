"""The token cache: in stage 2 the tokenizer is frozen, so every image is encoded only once.

    tokens_train.npy     (views, N, L) integers, memory-mapped: never loaded whole
    tokens_train.json    whose tokens these are: data set, images, tokenizer

While it is filled, the cache has names that end in .tmp. Rows that are still missing hold all ones,
which no code does. So a run that was stopped half way finds them and makes only those.
"""
import contextlib
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine.checkpoints import model_fingerprint
from engine.devices import autocast, to_device
from engine.progress import progress


@torch.no_grad()
def cache_tokens(settings, processes, folder, stop, tokenizer, pictures, split):
    """pictures: data.views.Views. -> memory-mapped (views, N, L) uint16 (int32 for V > 65,535)

    A cache that belongs to other data or another tokenizer is made again; one that was interrupted
    is finished. Raises OSError, leaving nothing behind, where the disk is full."""
    path = folder.path / f"tokens_{split}.npy"
    note, half, half_note = path.with_suffix(".json"), f"{path}.tmp", Path(f"{path}.json.tmp")
    header = dict(dataset=settings.dataset, split=split, views=pictures.count,
                  scales=list(tokenizer.scales), pictures=pictures.fingerprint(),
                  tokenizer=model_fingerprint(tokenizer))
    shape = (pictures.count, len(pictures), sum(s * s for s in tokenizer.scales))
    dtype = np.dtype(np.uint16 if tokenizer.config.vocab_size < 65536 else np.int32)
    if (cache := opened(path, note, header, shape, dtype)) is not None:
        return cache
    if changed := differences(note, header):
        processes.say(f"  tokens of {split}: {changed} changed since they were made; making them "
                      "again")
    ready = opened(half, half_note, header, shape, dtype) is not None
    processes.barrier()                      # nobody writes while others compare
    if processes.rank == 0:
        note.unlink(missing_ok=True)
        if ready:
            processes.say(f"  tokens of {split}: resuming where they were interrupted")
        else:
            half_note.unlink(missing_ok=True)
            fill(half, half_note, header, shape, dtype)
    processes.barrier()
    encode(settings, processes, stop, tokenizer, pictures, half, split)
    processes.barrier()
    if processes.rank == 0:
        os.replace(half, path)
        os.replace(half_note, note)
    processes.barrier()
    return np.load(path, mmap_mode="r")


def encode(settings, processes, stop, tokenizer, pictures, path, split):
    """Fill those rows of this process that are still missing.

    They are written as ranges of bytes, not through the memory map: machines that share a folder
    over a network would overwrite each other's neighbouring rows, page by page."""
    cache = np.load(path, mmap_mode="r")
    n, missing = len(pictures), np.array(-1).astype(cache.dtype)
    mine = np.array_split(np.arange(n), processes.world)[processes.rank]
    parts = np.split(mine, range(pictures.at_once, len(mine), pictures.at_once))
    jobs = [(rows, [view for view in range(len(cache)) if (cache[view, rows] == missing).any()])
            for rows in parts]
    steps = [(view, rows) for rows, views in jobs for view in views]
    images = pictures.batches([job for job in jobs if job[1]],
                              partial(to_device, device=processes.device))
    count = sum(len(rows) for _, rows in steps)
    # The images come first, so that they are asked for once more at the end: then they say how many
    # were skipped.
    work = progress(zip(images, steps), count, f"tokenized for {split}", say=processes.say,
                    size=lambda done: len(done[1][1]))
    with open(path, "r+b") as file:
        for done, (image, (view, rows)) in enumerate(work, 1):
            with autocast(processes.device, settings.precision):
                tokens = torch.cat(tokenizer.image_to_tokens(image), 1).cpu().numpy()
            file.seek(cache.offset + (view * n + rows[0]) * cache[0, 0].nbytes)
            file.write(tokens.astype(cache.dtype).tobytes())
            file.flush()
            if stop.asked():
                stop.leave(f"at {100 * done // len(steps)}% of the tokens")
        os.fsync(file.fileno())


def cached_rows(tokens, labels, indices, device):
    """Rows of a cache (views, N, L), an array or a tensor on the device, counted through all views.
    -> tokens (B, L) and labels (B,), int64 on the device"""
    _, n, L = tokens.shape
    if torch.is_tensor(tokens):
        indices = to_device(torch.from_numpy(indices), device)
        return tokens.view(-1, L)[indices].long(), labels[indices % n]
    found = torch.from_numpy(tokens.reshape(-1, L)[indices].astype(np.int64))
    return to_device(found, device), to_device(torch.from_numpy(labels[indices % n]), device)


def opened(path, note, header, shape, dtype):
    """The array in `path` if its note says that it is the one we want, else None."""
    with contextlib.suppress(Exception):     # missing or half a file; damaged ones raise anything
        if json.loads(note.read_text()) == header:
            cache = np.load(path, mmap_mode="r")
            return cache if (cache.shape, cache.dtype) == (shape, dtype) else None


def differences(note, header):
    """Which entries of an older note differ, as text; nothing if there is none."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        old = json.loads(note.read_text())
        return ", ".join(key for key in header if old.get(key) != header[key])
    return ""


def fill(path, note, header, shape, dtype):
    """A .npy file of this shape, all bits set, and its note. Every byte is written now: a memory
    map that meets a full disk later would kill the process without a word."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    try:
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, dict(
                descr=np.lib.format.dtype_to_descr(dtype), fortran_order=False, shape=shape))
            for start in range(0, size, 2 ** 24):
                file.write(b"\xff" * min(2 ** 24, size - start))
        note.write_text(json.dumps(header))
    except OSError as error:
        for half in (path, note):
            with contextlib.suppress(OSError):
                os.remove(half)
        raise OSError(f"cannot write the token cache {path}, {size / 2 ** 20:.1f} MB: "
                      f"{error.strerror}") from None
