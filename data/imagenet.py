"""ImageNet (ILSVRC 2012), or some of its classes, in folders named by WordNet ID ("wnid").

    data/imagenet/train/n01440764/*.JPEG     data/imagenet/val/n01440764/*.JPEG

Validation images that are not sorted into folders get their labels from a list, which is
LOC_val_solution.csv (Kaggle, images in ILSVRC/Data/CLS-LOC) or val/val_annotations.txt
(Tiny-ImageNet). Labels follow the order of the wnids, the official one: 0..n-1 for n classes.
"""
import functools
import re
from pathlib import Path

from data import folder
from engine import BadInput

DEFAULT_FOLDER = Path(__file__).with_name("imagenet")


def load(split, *, data_dir=None, size=256):
    """The split "train" or "test" (the folder val/): FolderImages, labels int64 (N,), class
    names such as "tench". data_dir: default data/imagenet/. Raises BadInput"""
    root = Path(data_dir or DEFAULT_FOLDER).expanduser()
    if not root.is_dir():
        raise BadInput(f"ImageNet is not in {root}: put train/<wnid>/*.JPEG and "
                       "val/<wnid>/*.JPEG there, or give --data-dir FOLDER that holds them")
    kaggle = root / "ILSVRC" / "Data" / "CLS-LOC"
    root = kaggle if kaggle.is_dir() else root
    images, labels, wnids = folder.load(split, data_dir=root, size=size, classes_of=_classes)
    names = wnid_names()
    for wnid in wnids:
        if wnid not in names:
            raise BadInput(f"{wnid!r} is not an ImageNet class: try --dataset {root}")
    return images, labels, [names[wnid] for wnid in wnids]


def _classes(base):
    """{wnid: image paths below `base`}, from class folders or else from a list of labels"""
    classes = folder.classes_in(base)
    lists = [base / "val_annotations.txt"]
    lists += [parent / "LOC_val_solution.csv" for parent in base.parents]
    path = next((path for path in lists if path.is_file()), None)
    if not path or list(classes) not in ([""], ["images"]):
        return classes
    lines = [re.split(r"[,\s]+", line) for line in path.read_text().splitlines()]
    wnid_of = {Path(line[0]).stem: line[1] for line in lines if len(line) > 1}
    labelled = {}
    for image in next(iter(classes.values())):
        labelled.setdefault(wnid_of.get(Path(image).stem, ""), []).append(image)
    return labelled


@functools.cache
def wnid_names():
    """-> {wnid: name} x 1000, in label order; all names differ"""
    table = Path(__file__).with_name("imagenet_classes.txt").read_text("utf-8")
    return dict(line.split(" ", 1) for line in table.splitlines())
