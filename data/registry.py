"""The data sets by name. A new one is a file with its reader and one line in DATASETS."""
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
    judge_steps: int = 2000     # how long the judge of its samples is trained
    examples: Callable | None = None    # a few held-out images that come with the code, as of load


DATASETS = {
    "shapes": Dataset(shapes.load, judge_steps=100),
    "cifar10": Dataset(cifar10.load, examples=cifar10.examples),
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


def find_class(names, text):
    """A class by name, index or wnid of ImageNet -> index. Raises BadInput that lists some of the
    names."""
    if len(names) == 1000 and names == imagenet.class_names():
        return imagenet.find_class(text)
    folded = [name.casefold() for name in names]
    if text.casefold() in folded:
        return folded.index(text.casefold())
    if text.isdecimal() and len(text) < 9 and int(text) < len(names):
        return int(text)
    if (name := imagenet.name_of(text)) in names:          # some of its classes, in folders
        return names.index(name)
    raise BadInput(f"no class {text!r}; there are {len(names)}, 0 to {len(names) - 1}: "
                   + ", ".join(names[:12]))


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
