"""The data sets by name. A new one is a file with its reader and one line in DATASETS."""
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

from data import cifar10, folder, imagenet, shapes
from engine import BadInput


@dataclass(frozen=True)
class Dataset:
    """load(split, *, data_dir, size) -> (images uint8 (N, size, size, 3), labels int64 (N,), class
    names). Images are in memory, or read on demand as those of data/folder.py are."""
    load: Callable
    judge_steps: int = 2000     # how long the judge of its samples is trained


DATASETS = {
    "shapes": Dataset(shapes.load, judge_steps=100),
    "cifar10": Dataset(cifar10.load),
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
