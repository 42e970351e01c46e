"""ImageNet (ILSVRC 2012), or some of its classes, from folders named by WordNet number ("wnid").

    imagenet/train/n01440764/*.JPEG     imagenet/val/n01440764/*.JPEG

Validation images that are not sorted into folders get their labels from the list beside them:

    LOC_val_solution.csv                          Kaggle; images in ILSVRC/Data/CLS-LOC
    ILSVRC2012_validation_ground_truth.txt        the official devkit, with its meta.mat
    val/val_annotations.txt                       Tiny-ImageNet, images in val/images

Sorted wnids are the official label order, so the folder reader's labels are already the right
ones: 0..999 for the whole, 0..n-1 in the same order for n of the classes.
"""
import contextlib
import functools
import re
import struct
import zlib
from pathlib import Path

import numpy as np

from data import folder
from engine import BadInput

TABLE = Path(__file__).resolve().parent / "imagenet_classes.txt"   # "wnid name", line 1 is label 0
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
LISTS = ("LOC_val_solution.csv", "val_annotations.txt", TRUTH,
         "ILSVRC2012_devkit_t12/data/" + TRUTH)


def load(split, *, data_dir, size=256):
    """One split: (folder.FolderImages, labels int64 (N,), class names such as "tench").

    split: "train" or "test" (the folder val/). Raises BadInput if the layout is not ImageNet's, or
    if a class has no image to test on.
    """
    if not data_dir:
        raise BadInput("ImageNet cannot be downloaded freely: give --data-dir FOLDER that holds "
                       "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG")
    root = Path(data_dir).expanduser()
    if (kaggle := root / "ILSVRC" / "Data" / "CLS-LOC").is_dir():
        root = kaggle
    images, labels, wnids = folder.load(split, data_dir=root, size=size, classes_of=_classes)
    names = dict(_table())
    if unknown := [wnid for wnid in wnids if wnid not in names]:
        raise BadInput(f"{unknown[0]!r} in {data_dir} is not an ImageNet class folder (they look "
                       f"like n01440764): for other images use --dataset {data_dir}")
    if missing := sorted(set(range(len(wnids))) - set(np.unique(labels).tolist())):
        raise BadInput(f"{images.root} has no {split} images of {len(missing)} of the "
                       f"{len(wnids)} classes ({names[wnids[missing[0]]]}, {wnids[missing[0]]}): "
                       "complete it, or remove these classes from train/")
    return images, labels, [names[wnid] for wnid in wnids]


def _classes(base):
    """{wnid: [image paths below `base`]}, by folders or by a list of labels."""
    folders, loose = folder.scan(base)
    if folders not in ([], ["images"]):
        return folder.classes_in(base)
    places = [parent / name for parent in (base, *base.parents[:4]) for name in LISTS]
    path = next((place for place in places if place.is_file()), None)
    if not path:
        raise BadInput(f"the images in {base} are not sorted into classes: put "
                       f"LOC_val_solution.csv (Kaggle) or {TRUTH} and meta.mat (devkit) beside it, "
                       "or move each image to val/<wnid>/")
    try:
        wnid_of = _labels(path)
    except ValueError as error:
        raise BadInput(f"{path} is not the list of labels that it should be: {error}") from None
    classes, known = {}, dict(_table())
    for image in loose or [f"images/{name}" for name in folder.scan(base / "images")[1]]:
        if not (wnid := wnid_of.get(Path(image).stem)):
            raise BadInput(f"{path} has no label for {image} in {base}")
        if wnid not in known:
            raise BadInput(f"{path} gives {image} the label {wnid!r}, which is no ImageNet class")
        classes.setdefault(wnid, []).append(image)
    return dict(sorted(classes.items()))


def _labels(path):
    """{image name without its ending: wnid}, read from one of LISTS."""
    lines = path.read_text().rstrip().splitlines()
    if path.name == TRUTH:      # line n holds the devkit's class number, 1..1000, of image n
        wnid_of = dict(zip(map(str, range(1, 1001)), _devkit_wnids(path.with_name("meta.mat"))))
        numbers = [line.strip() for line in lines]
        for n, number in enumerate(numbers, 1):
            if number not in wnid_of:
                raise ValueError(f"line {n} is {number!r}, not a class number of 1..1000")
        return {f"ILSVRC2012_val_{n:08}": wnid_of[number] for n, number in enumerate(numbers, 1)}
    # "name,wnid ..." or "name\twnid\t..."
    fields = [re.split(r"[,\s]", line) for line in lines if line.strip()]
    return {Path(name).stem: wnid for name, wnid, *_ in fields}


def _devkit_wnids(path):
    """The 1000 wnids in the order of the devkit's class numbers, which is not the sorted one.
    meta.mat (MATLAB 5) lists them in compressed blocks; the synsets above the classes follow."""
    with contextlib.suppress(OSError, struct.error, zlib.error):
        raw, at, text = path.read_bytes(), 128, b""
        while at < len(raw):
            kind, size = struct.unpack_from("<II", raw, at)
            block = raw[at + 8:at + 8 + size]
            text += zlib.decompress(block) if kind == 15 else block
            at += 8 + size
        wnids = re.findall(r"n\d{8}", text.replace(b"\0", b"").decode("latin-1"))[:1000]
        if set(wnids) == {wnid for wnid, _ in _table()}:
            return wnids
    raise BadInput(f"{path} is missing or is not the devkit's: the validation labels need it")


def class_names():
    """The 1000 names in label order, all different."""
    return [name for _, name in _table()]


def name_of(wnid):
    """Name of a class -> str, or None if there is no such wnid"""
    return dict(_table()).get(wnid)


@functools.cache
def _table():
    """-> [(wnid, name)] x 1000, in label order"""
    return [tuple(line.split(" ", 1)) for line in TABLE.read_text("utf-8").splitlines()]
