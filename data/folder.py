"""Any folder of class folders (an ImageNet subset, your own images), or one flat folder.

    insects/ant/*.jpg   insects/bee/*.png                  two classes; one image in 20 is held out
    insects/train/ant/*.jpg   insects/val/ant/*.jpg        the splits as they stand
    insects/*.jpg                                          one class: unconditional

A hash of its name decides whether an image is held out. So it stays on its side on every machine
and when others are added. But in classes of few images, at least one of which must be held out, a
new image can take the place of the one that was. And frames of one video look alike under
different names: put all of them into train/ or all into val/.

Images are decoded when asked for: 1.28 million of them take the memory of their names. Embedded
colour profiles are not applied.
"""
import hashlib
import os
import sys
import unicodedata
import warnings
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from engine import BadInput

# Formats are named, so that a disguised file can never reach decoders that start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
EXTENSIONS = tuple(".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .jp2".split())
HELD_OUT = 1 / 20      # share of the images that is kept for testing


def load(split, *, data_dir, size=256, classes_of=None):
    """One split: (FolderImages of N images, labels int64 (N,), class names).

    split: "train" or "test". Test images come from val/, valid/ or test/ if there is one beside
    train/, else they are one in 20 of each class (see `held_out`). size: side of the square crops.
    classes_of(folder): how the images of train/ or val/ are sorted, if not by `classes_in`.
    Raises BadInput if the folder is missing, empty, or not laid out as above.
    """
    if split not in ("train", "test"):
        raise BadInput(f"the splits are train and test, not {split!r}")
    if not data_dir:
        raise BadInput("give --data-dir FOLDER, a folder of class folders of images")
    root = Path(data_dir).expanduser()
    try:
        base, classes, class_names = _split(root, split, classes_of or classes_in)
    except OSError as error:   # not there, a file, no permission
        raise BadInput(f"expected a folder of class folders of images: {error}") from error
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = [label_of[name] for name, paths in classes.items() for _ in paths]
    if not labels:
        raise BadInput(f"{root} holds one image, so none is left to test on: add more")
    images = FolderImages(base, chain.from_iterable(classes.values()), labels, size)
    images[0]   # finds out now, not after an hour, if nothing here can be read
    return images, images.labels, [composed(name or root.resolve().name) for name in class_names]


def scan(folder):
    """Sorted names of the (sub-folders, images) in a folder; hidden entries do not count."""
    with os.scandir(folder) as entries:   # asks the disk about links only: quick for a million
        entries = [e for e in entries if not e.name.startswith((".", "__MACOSX"))]
    images = [e.name for e in entries if e.name.lower().endswith(EXTENSIONS) and e.is_file()]
    folders = [e.name for e in entries if e.is_dir()]
    return sorted(folders, key=composed), sorted(images, key=composed)


def composed(name):
    """The form of a name that all systems share: some keep "ä" as one character, others as "a" and
    two dots."""
    return unicodedata.normalize("NFC", name)


def classes_in(folder):
    """{class folder: [image paths relative to `folder`]}, sorted; {"": [...]} if it is flat. The
    images of a class may lie in images/ inside its folder, as those of Tiny-ImageNet do."""
    folders, loose = scan(folder)
    classes = {}
    for name in folders:
        inside, images = scan(folder / name)
        if not images and "images" in inside:
            images = [f"images/{image}" for image in scan(folder / name / "images")[1]]
        if images:
            classes[name] = [f"{name}/{image}" for image in images]
    if classes and loose:
        print(f"ignored images outside the folders of {folder}: {len(loose)}", file=sys.stderr)
    if not classes and not loose:
        raise BadInput(f"no images in {folder}: expected <class>/<image>.jpg, .png or the like")
    return classes or {"": loose}


def _split(root, split, classes_of):
    """-> (folder, {class: [relative paths]} of this split, names of all classes)"""
    folders, _ = scan(root)
    other = next((name for name in ("val", "valid", "test") if name in folders), None)
    # A class may be called "train" (beside "car" and "bus"): a split has folders in or beside it.
    has_train = "train" in folders and (other or scan(root / "train")[0])
    base = root / "train" if has_train else root
    classes = classes_of(base)
    names = list(classes)
    if not (has_train and other):
        groups = list(classes.values())
        if all(len(group) == 1 for group in groups):     # no class has an image to spare
            groups = [[path for path, in groups]]
        held = {path for group in groups for path, is_held in zip(group, held_out(group))
                if is_held}
        classes = {name: [path for path in paths if (path in held) == (split == "test")]
                   for name, paths in classes.items()}
    elif split == "test":
        base = root / other
        classes = classes_of(base)
        for name in classes.keys() - set(names):
            what = f"the class {name!r}" if name else "images outside class folders"
            raise BadInput(f"{base} holds {what}: sort its images into those of {root}/train")
        if missing := [name for name in names if name not in classes]:
            print(f"{base} lacks {len(missing)} of the {len(names)} classes of train: "
                  f"{', '.join(missing[:3])}", file=sys.stderr)
    return base, classes, names


def held_out(names):
    """Which of the images with these names (paths below the folder) are held out: about one in 20,
    each decided by a hash of its name; of two or more at least one, and never all. -> (n,) bool"""
    hashes = np.array([int.from_bytes(hashlib.sha256(os.fsencode(composed(name))).digest()[:8],
                                      "big") for name in names], np.uint64)
    held = hashes < HELD_OUT * 2 ** 64
    if names:
        first, last = hashes.argsort(kind="stable")[[0, -1]]   # of equal hashes too, they differ
        held[first], held[last] = True, False                  # one image alone is `last`: False
    return held


class FolderImages:
    """Images read on demand: images[i] is the centre crop, images.crops(i, seeds) are random ones.

    All are uint8 (size, size, 3), from the image with its short side brought to 1.125 x size. One
    that is unreadable or far too large is replaced by the next readable one of its class (of any
    class, if its own has none) and marked in `bad` (N,), which all loading workers share.
    """

    def __init__(self, root, paths, labels, size):
        self.root, self.size, self.short = str(root), size, round(1.125 * size)
        self.labels = np.asarray(labels, np.int64)   # (N,), rising
        self.bad = torch.zeros(len(self.labels), dtype=torch.bool).share_memory_()
        # One block of bytes: of a list of strings every worker process would slowly make a copy,
        # because merely reading a Python string writes its reference count.
        encoded = [os.fsencode(path) for path in paths]
        self.names = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded])

    def __len__(self):
        return len(self.labels)

    @property
    def shape(self):
        return len(self), self.size, self.size, 3

    def subset(self, rows, labels):
        """Some of the images, with new labels that rise as well."""
        paths = [self.relative_path(i) for i in rows]
        return FolderImages(self.root, paths, labels, self.size)

    def __getitem__(self, i):
        return self.crops(i, [-1])[0]

    def crops(self, i, seeds):
        """Crops of one image, which is decoded once: each decided by (seed, i) alone, or the centre
        for the seed -1. -> uint8 (len(seeds), size, size, 3)"""
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        i %= len(self)
        image, extent = self._readable(i)
        places = [np.random.default_rng([seed, i]).random(2) if seed >= 0 else (0.5, 0.5)
                  for seed in seeds]
        return np.stack([self._cut(image, extent, place) for place in places])

    def skipped(self):
        """How many images have been found that cannot be read."""
        return int(self.bad.sum())

    def path(self, i):
        """Where image i lies."""
        return os.path.join(self.root, self.relative_path(i))

    def relative_path(self, i):
        start = self._ends[i - 1] if i else 0
        return os.fsdecode(self.names[start:self._ends[i]])

    def _cut(self, image, extent, place):
        """Resize and crop in one go: only what is kept gets computed, however long the image."""
        box = []
        for side, share in zip(extent, place):
            resized = round(side * self.short / min(extent))
            start = int(share * (resized - self.size + 1)) * side / resized
            box += [start, min(start + self.size * side / resized, side)]
        return np.array(image.resize((self.size, self.size), Image.Resampling.LANCZOS,
                                     box[::2] + box[1::2]))   # left, top, right, bottom

    def _readable(self, i):
        first, end = np.searchsorted(self.labels, [self.labels[i], self.labels[i] + 1])
        for j in chain(range(i, end), range(first, i), range(end, len(self)), range(first)):
            if not self.bad[j]:
                try:
                    return decode(self.path(j), 2 * self.short)
                except Exception as error:   # damaged files raise nearly anything
                    self.bad[j] = True
                    print(f"skipped unreadable image {self.path(j)}: {error}", file=sys.stderr)
        raise BadInput(f"none of the {len(self)} images in {self.root} can be read")


def decode(path, enough=10 ** 9):
    """-> (the whole image as RGB, upright, on white; its width and height).

    JPEGs of twice `enough` pixels a side or more come at 1/2, 1/4 or 1/8, in less time. Their last
    row and column may be partial, and the sizes fractions: rounding them shifts the image.
    Raises nearly anything for a damaged file, and what Pillow warns of above 89 million pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            drafted = image.draft(None, (enough, enough))
            extent = drafted[1][2:] if drafted else image.size
            return _upright(image, extent)


def _upright(image, extent):
    image.load()
    stored = image.size
    with suppress(Exception):   # broken notes about an image do not make it unreadable
        ImageOps.exif_transpose(image, in_place=True)
    extent = extent if image.size == stored else extent[::-1]
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep_grey(np.asarray(image), image.mode), extent
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"), extent
    return image.convert("RGB"), extent


def _from_deep_grey(grey, mode):
    """Grey levels (H, W) of 16 bits or more -> RGB; Pillow's own conversion would clip at 255."""
    grey = np.nan_to_num(grey.astype(np.float64)).clip(0)
    ranges = (1, 255, 65535) if mode == "F" else (65535, 2 ** 31 - 1)
    white = next((top for top in ranges if grey.max() <= top), grey.max())
    return Image.fromarray(np.rint(grey * (255 / white)).astype(np.uint8)).convert("RGB")
