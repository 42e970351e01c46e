"""The data sets by name. A new one is a file with its reader and one line in DATASETS.

It is trained with the preset "folder" (64 px), unless engine/presets.py has one of its name."""
import difflib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data import cifar10, folder, imagenet, shapes
from engine import BadInput


@dataclass(frozen=True)
class Dataset:
    """load(split, *, data_dir, size) -> (images uint8 (N, size, size, 3), labels int64 (N,), class
    names). Images are in memory, or read on demand as those of data/folder.py are."""
    load: Callable
    judge_steps: int = 2000     # how long the judge of its samples is trained (report/judge.py)
    judge_width: int = 24       # and channels of its first layers
    mirrored: bool = False      # an image and its mirror image are of one class
    examples: Callable | None = None    # a few held-out images that come with the code, as of load


DATASETS = {
    "shapes": Dataset(shapes.load, judge_steps=100),
    "cifar10": Dataset(cifar10.load, 9000, judge_width=48, mirrored=True,
                       examples=cifar10.examples),
    "imagenet": Dataset(imagenet.load),
}


def dataset_named(name):
    """A name that is not in DATASETS is the path of a folder. Raises BadInput if there is none."""
    if name in DATASETS:
        return DATASETS[name]
    if os.path.exists(name):
        return Dataset(functools.partial(load_folder, name))
    raise BadInput(f"unknown data set {name!r}: use {', '.join(DATASETS)} or the path of a folder "
                   "with pictures")


def load_folder(path, split, *, data_dir, size):
    return folder.load(split, data_dir=path, size=size)


def load_data(dataset, split, image_size, data_dir=""):
    """dataset: a name or a path; split: "train" or "test". -> images, labels, class names"""
    return dataset_named(dataset).load(split, data_dir=data_dir or None, size=image_size)


def load_splits(dataset, image_size, data_dir="", wanted=()):
    """-> {split: (images, labels)}, the same with the images of the classes `wanted` alone (see
    chosen_classes; nothing: all), the names of these classes"""
    *train, names = load_data(dataset, "train", image_size, data_dir)
    *test, _ = load_data(dataset, "test", image_size, data_dir)
    splits = {"train": train, "test": test}
    if not wanted:
        return splits, splits, names
    classes = chosen_classes(names, wanted)
    return (splits, {split: subset(*found, classes) for split, found in splits.items()},
            [names[c] for c in classes])


def find_class(names, text):
    """The index of a class by its name, index, wnid, or a part of its name that no other has.
    Raises BadInput, with suggestions, if none or more than one fits."""
    text, folded, every = text.strip(), [name.casefold() for name in names], range(len(names))
    wanted, its_name = text.casefold(), imagenet.name_of(text)
    same = [k for k in every if names[k] == text]          # Cardigan is a dog, cardigan is knitted
    alike = [k for k in every if folded[k] == wanted]
    counted = [k for k in every if str(k) == text]
    numbered = [k for k in every if names[k] == its_name]
    parts = [k for k in every if wanted and wanted in folded[k]]
    hits = same or alike or counted or numbered or parts
    if len(hits) == 1:
        return hits[0]
    near = hits or [folded.index(name) for name in difflib.get_close_matches(wanted, folded)]
    listed = ", ".join(f"{names[k]} ({k})" for k in (near or every)[:10])
    raise BadInput(f"{text!r} fits {len(hits) or 'none'} of the {len(names)} classes; there are "
                   f"{listed}")


def chosen_classes(names, wanted):
    """wanted: names or wnids, or one number N for the first N classes.
    -> indices, in the order of the data set"""
    if len(wanted) == 1 and wanted[0].isdecimal():
        count = int(wanted[0])
        if not 1 <= count <= len(names):
            raise BadInput(f"--classes {wanted[0]}: there are {len(names)} classes")
        return list(range(count))
    return sorted({find_class(names, text) for text in wanted})


def subset(images, labels, classes):
    """The images of some classes (rising indices), whose labels become 0, 1, 2, ..."""
    rows = np.flatnonzero(np.isin(labels, classes))
    new_labels = np.searchsorted(classes, labels[rows]).astype(np.int64)
    if isinstance(images, np.ndarray):
        return images[rows], new_labels
    return images.subset(rows, new_labels), new_labels
