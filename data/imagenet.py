"""ImageNet (ILSVRC 2012), or a part of it, from folders named by WordNet number ("wnid").

    imagenet/train/n01440764/*.JPEG     imagenet/val/n01440764/*.JPEG

Validation pictures that lie flat in val/ are sorted by the list of labels that came with them:

    LOC_val_solution.csv                          Kaggle's download, pictures in ILSVRC/Data/CLS-LOC
    ILSVRC2012_validation_ground_truth.txt        the official devkit, beside its meta.mat
    val/val_annotations.txt                       Tiny-ImageNet, pictures in val/images

Sorted wnids are the official label order, so the folder reader's labels are already the right
ones: 0..999 for the whole, 0..n-1 in the same order for n of the classes.
"""
import difflib
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
    if a class has no picture to test on.
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
                       f"like n01440764): for other pictures use --dataset {data_dir}")
    if missing := sorted(set(range(len(wnids))) - set(np.unique(labels).tolist())):
        raise BadInput(f"{images.root} has no {split} pictures of {len(missing)} of the "
                       f"{len(wnids)} classes ({names[wnids[missing[0]]]}, {wnids[missing[0]]}): "
                       "complete it, or remove these classes from train/")
    return images, labels, [names[wnid] for wnid in wnids]


def _classes(base):
    """{wnid: [picture paths below `base`]}, by folders or by a list of labels."""
    folders, loose = folder.scan(base)
    if folders not in ([], ["images"]):
        return folder.classes_in(base)
    pictures = loose or [f"images/{name}" for name in folder.scan(base / "images")[1]]
    lists = [place / name for place in (base, *base.parents[:4]) for name in LISTS]
    found = next((path for path in lists if path.is_file()), None)
    if not found:
        raise BadInput(f"the pictures in {base} are not sorted into classes: put "
                       f"LOC_val_solution.csv (Kaggle) or {TRUTH} and meta.mat (devkit) beside it, "
                       "or move each picture to val/<wnid>/")
    try:
        wnid_of, classes = _labels(found), {}
    except (ValueError, IndexError) as error:
        raise BadInput(f"{found} is not the list of labels that it should be: {error}") from None
    for picture in pictures:
        if (wnid := wnid_of.get(Path(picture).stem)) is None:
            raise BadInput(f"{found} has no label for {picture} in {base}")
        classes.setdefault(wnid, []).append(picture)
    return {wnid: classes[wnid] for wnid in sorted(classes)}


def _labels(path):
    """{picture name without its ending: wnid}, read from one of LISTS."""
    lines = path.read_text().splitlines()
    if path.name == TRUTH:      # line n holds the devkit's number, 1..1000, of picture n
        wnids = _devkit_wnids(path.with_name("meta.mat"))
        return {f"ILSVRC2012_val_{n:08}": wnids[int(line) - 1] for n, line in enumerate(lines, 1)}
    fields = [re.split(r"[,\s]", line) for line in lines]    # "name,wnid ..." or "name\twnid\t..."
    return {Path(field[0]).stem: field[1] for field in fields if len(field) > 1}


def _devkit_wnids(path):
    """The 1000 wnids in the devkit's order, which is not the sorted one. meta.mat (MATLAB 5) holds
    them in that order, in compressed blocks; the synsets above the classes follow."""
    try:
        raw, at, text = path.read_bytes(), 128, b""
        while at < len(raw):
            kind, size = struct.unpack_from("<II", raw, at)
            block = raw[at + 8:at + 8 + size]
            text += zlib.decompress(block) if kind == 15 else block
            at += 8 + size
        wnids = re.findall(r"n\d{8}", text.replace(b"\0", b"").decode("latin-1"))[:1000]
        if set(wnids) == {wnid for wnid, _ in _table()}:
            return wnids
    except (OSError, struct.error, zlib.error):
        pass
    raise BadInput(f"{path} is missing or is not the devkit's: the validation labels need it")


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
