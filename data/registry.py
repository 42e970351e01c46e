"""The data sets by name. A new one is a file with its reader and one line in DATASETS."""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import cifar10, folder, imagenet, shapes
from engine import BadInput


@dataclass(frozen=True)
class Dataset:
    """load(split, *, data_dir, size) -> (images uint8 (N, size, size, 3), labels int64 (N,),
    class names). Images are in memory, or read on demand like those of data/folder.py."""
    load: Callable
    judge_steps: int = 2000             # training steps of its judge (report/judge.py)
    judge_width: int = 24               # channels of the judge's first layers
    mirrored: bool = False              # an image and its mirror image are of one class
    examples: Callable | None = None    # returns held-out images that come with the code


DATASETS = {
    "shapes": Dataset(shapes.load, judge_steps=100),
    "cifar10": Dataset(cifar10.load, judge_steps=3000, judge_width=48, mirrored=True,
                       examples=cifar10.examples),
    "imagenet": Dataset(imagenet.load),
}


def dataset_named(name):
    """A name in DATASETS or the path of a folder of images -> Dataset. Raises BadInput"""
    if name in DATASETS:
        return DATASETS[name]
    if Path(name).expanduser().exists():
        return Dataset(folder.load)
    raise BadInput(f"unknown data set {name!r}: use {', '.join(DATASETS)} or the path of a "
                   "folder of images")


def load_data(dataset, split, image_size, data_dir=""):
    """dataset: a name or a path; split: "train" or "test" -> images, labels, class names"""
    where = data_dir if dataset in DATASETS else dataset
    return dataset_named(dataset).load(split, data_dir=where or None, size=image_size)


def load_splits(dataset, image_size, data_dir="", wanted=()):
    """-> {split: (images, labels)} of the whole data set, the same for the classes `wanted`
    (see chosen_classes; none: all), and the names of these classes. Raises BadInput"""
    splits, chosen = {}, {}
    for split in ("train", "test"):
        images, labels, names = load_data(dataset, split, image_size, data_dir)
        splits[split] = chosen[split] = images, labels
    if wanted:
        classes = chosen_classes(names, wanted)
        names = [names[k] for k in classes]
        chosen = {split: subset(*found, classes) for split, found in splits.items()}
    for split, what in ("train", "training"), ("test", "held-out"):
        if not len(chosen[split][1]):
            raise BadInput(f"there are no {what} images of {', '.join(names[:10])}: add some")
    return splits, chosen, names


def find_class(names, text):
    """The index of the class with this name or wnid, or else this index, or else this part of
    its name. Raises BadInput unless exactly one class fits."""
    name = text.strip()
    if name not in names:                 # in a folder data set, wnids may be the names
        name = imagenet.wnid_names().get(name, name)
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    hits = [other for other in names if name.casefold() in other.casefold()]
    if len(hits) == 1:
        return names.index(hits[0])
    raise BadInput(f"{text!r} fits {len(hits) or 'none'} of the {len(names)} classes, such as "
                   f"{', '.join((hits or names)[:10])}")


def chosen_classes(names, wanted):
    """wanted: texts for find_class, or one number N for the first N classes unless a class has
    this name -> indices, in the order of the data set"""
    if len(wanted) == 1 and wanted[0].isdecimal() and wanted[0] not in names:
        if not 1 <= int(wanted[0]) <= len(names):
            raise BadInput(f"--classes {wanted[0]}: there are {len(names)} classes")
        return list(range(int(wanted[0])))
    return sorted({find_class(names, text) for text in wanted})


def subset(images, labels, classes):
    """The images of some classes (rising indices), whose labels become 0, 1, 2, ..."""
    rows = np.flatnonzero(np.isin(labels, classes))
    labels = np.searchsorted(classes, labels[rows])
    chosen = images[rows] if isinstance(images, np.ndarray) else images.subset(rows, labels)
    return chosen, labels
