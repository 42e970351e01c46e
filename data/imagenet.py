"""ImageNet (ILSVRC 2012), or a part of it, from folders named by WordNet number ("wnid").

    imagenet/train/n01440764/*.JPEG     imagenet/val/n01440764/*.JPEG

Sorted wnids are the official label order, so the folder reader's labels are already the right
ones: 0..999 for the whole, 0..n-1 in the same order for n of the classes.
"""
import difflib
from pathlib import Path

from data import folder
from engine import BadInput

TABLE = Path(__file__).resolve().parent / "imagenet_classes.txt"   # "wnid name", line 1 is label 0


def load(split, *, data_dir, size=256):
    """One split: (folder.FolderImages, labels int64 (N,), class names such as "tench").

    split: "train" or "test" (the folder val/). Raises BadInput if the layout is not ImageNet's.
    """
    if not data_dir:
        raise BadInput("ImageNet cannot be downloaded freely: give --data-dir FOLDER that holds "
                       "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG")
    images, labels, wnids = folder.load(split, data_dir=data_dir, size=size)
    names = dict(_table())
    if unknown := [wnid for wnid in wnids if wnid not in names]:
        raise BadInput(f"{unknown[0]!r} in {data_dir} is not an ImageNet class folder (they look "
                       f"like n01440764): for other pictures use --dataset {data_dir}")
    return images, labels, [names[wnid] for wnid in wnids]


def class_names():
    """The 1000 names in label order. Two occur twice: crane and maillot."""
    return [name for _, name in _table()]


def find_class(text):
    """The label, 0..999, of a name, wnid, number, or part of a name that fits one class only.

    find_class("tench") = find_class("n01440764") = find_class("0") = 0; find_class("dfish") = 1.
    Raises BadInput, with up to five suggestions, if no class or more than one fits.
    """
    table, wanted = _table(), text.strip().lower()
    if wanted.isdecimal() and int(wanted) < len(table):
        return int(wanted)
    same = [k for k, (_, name) in enumerate(table) if name == text.strip()]   # Cardigan: a dog;
    alike = [k for k, pair in enumerate(table) if wanted in (pair[0], pair[1].lower())]   # cardigan
    parts = [k for k, (_, name) in enumerate(table) if wanted and wanted in name.lower()]
    hits = same or alike or parts
    if len(hits) == 1:
        return hits[0]
    names = [name.lower() for _, name in table]
    near = hits or [names.index(n) for n in difflib.get_close_matches(wanted, names, 5)]
    listed = ", ".join(f"{table[k][1]} ({k})" for k in near[:5])
    raise BadInput(f"{text!r} fits {len(hits) or 'none'} of the 1000 ImageNet classes"
                   + (f": did you mean {listed}?" if near else ": give a name, wnid or 0..999"))


def _table():
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return [tuple(line.split(" ", 1)) for line in lines]   # [(wnid, name)] x 1000
