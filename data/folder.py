"""Any folder of class folders (an ImageNet subset, your own images), or one flat folder.

    insects/ant/*.jpg   insects/bee/wild/*.png       one image in 20 is held out for testing
    insects/train/ant/*.jpg  insects/val/ant/*.jpg   the splits as they are
    insects/*.jpg                                    one class: unconditional

A class owns all images below its folder, at any depth. Without a test folder, a hash of its path
decides whether an image is held out; frames of one video are better sorted by hand.
"""
import hashlib
import os
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from engine import BadInput, distributed

# Only these are tried, so a disguised file cannot reach a decoder that runs programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
EXTENSIONS = tuple(".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())

say_once = cache(distributed.say)


def load(split, *, data_dir, size=256, classes_of=None):
    """One split: (FolderImages of N images, labels int64 (N,), class names).

    split: "train" or "test" (val/, valid/ or test/, if there is one beside train/). size:
    side of the square crops. classes_of: replaces `classes_in`. Raises BadInput"""
    classes_of = classes_of or classes_in
    root = Path(data_dir).expanduser()
    train = root / "train"
    tests = [root / name for name in ("val", "valid", "test") if (root / name).is_dir()]
    base = train if train.is_dir() and tests else root
    known = classes_of(base)
    if list(known) == ["train"]:                    # no class of this name but a lone split
        base, known = train, classes_of(train)
    classes = known
    if base == root or not tests:
        classes = hold_out(known, split)
    elif split == "test":
        base, classes = tests[0], classes_of(tests[0])
        for name in set(classes) - set(known):
            what = f"the class {name!r}" if name else "images outside class folders"
            raise BadInput(f"{base} holds {what}: sort its images into those of {train}")
    paths, labels = [], []
    for label, name in enumerate(known):
        paths += classes.get(name, [])
        labels += [label] * (len(paths) - len(labels))
    images = FolderImages(base, paths, labels, size)
    return images, images.labels, [name or root.resolve().name for name in known]


def classes_in(folder):
    """{class folder: sorted image paths below `folder`}, or {"": paths} for a flat folder.
    Prints what it passes over. Raises BadInput if there are no images."""
    paths = []
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(base).relative_to(folder).parts
        paths += ["/".join((*below, name)) for name in files if not name.startswith(".")]
    paths.sort()
    images = [path for path in paths if path.lower().endswith(EXTENSIONS)]
    nested = [path for path in images if "/" in path]
    classes = {}
    for path in nested or images:
        classes.setdefault(path.split("/")[0] if nested else "", []).append(path)
    others = sorted(set(paths) - set(nested or images))
    visible = sorted(folder.glob("[!.]*"))
    empty = [path.name for path in visible if path.is_dir() and path.name not in classes]
    if not images:
        raise BadInput(f"there are no images in {folder} (other files: {others[:3]}): unpack "
                       "archives, and sort the images as <class>/<image>.jpg")
    if others:
        say_once(f"passed over {len(others)} file(s) in {folder} (no known image format, or "
                 f"outside the class folders), such as {others[0]!r}")
    if empty:
        say_once(f"no images in these folders of {folder}: {', '.join(empty[:10])}")
    return {name: classes[name] for name in sorted(classes, key=natural)}


def natural(name):
    """A sort key that puts class 2 before class 10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if part.isdecimal() else part for part in parts], name


def hold_out(classes, split):
    """The images of one split: a hash of its path decides whether an image is held out. About
    one in 20 is; of two or more in a class at least one, never all. -> {class: paths}"""
    groups = list(classes.values())
    if all(len(paths) == 1 for paths in groups):    # no class has an image to spare
        groups = [[paths[0] for paths in groups]]
    held = set()
    for paths in groups:
        hashes = [hashlib.sha256(os.fsencode(path)).hexdigest()[:16] for path in paths]
        count = sum(int(digits, 16) < 2 ** 64 / 20 for digits in hashes)
        count = min(max(count, 1), len(paths) - 1)
        held.update(path for digits, path in sorted(zip(hashes, paths))[:count])
    kept = {}
    for name, paths in classes.items():
        kept[name] = [path for path in paths if (path in held) == (split == "test")]
    return kept


class FolderImages:
    """Images decoded on demand: images[i] is the centre crop, images[i, seed] a random one.

    Crops are uint8 (size, size, 3), cut out of the image after its short side was resized
    to 1.125 x size. An unreadable image is named, and the next readable one of its class
    takes its place. `unreadable` (N,), shared by all workers, marks those found so far."""

    def __init__(self, root, paths, labels, size):
        self.root, self.size = root, size
        self.labels = np.asarray(labels, np.int64)  # (N,), rising
        # One array, because every worker process would slowly copy a list of strings.
        self.names = np.array([os.fsencode(path) for path in paths])
        self.unreadable = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.labels)

    def subset(self, rows, labels):
        """Some of the images, with new labels, which rise as well."""
        return FolderImages(self.root, self.names[rows], labels, self.size)

    def path(self, i):
        return Path(self.root, os.fsdecode(self.names[i]))

    def __getitem__(self, index):
        """index: i or (i, seed). A seed of -1 means the centre, too."""
        i, seed = index if isinstance(index, tuple) else (index, -1)
        image = self.decoded(i)
        side = min(image.size) * self.size / round(1.125 * self.size)     # before resizing
        place = np.random.default_rng([seed, i]).random(2) if seed >= 0 else 0.5
        left, top = place * (np.array(image.size) - side)
        box = (left, top, left + side, top + side)
        return np.array(image.resize((self.size, self.size), Image.Resampling.LANCZOS, box))

    def decoded(self, i):
        first, end = np.searchsorted(self.labels, [self.labels[i], self.labels[i] + 1])
        for j in [*range(i, end), *range(first, i)]:
            if not self.unreadable[j]:
                try:
                    return decode(self.path(j))
                except Exception as error:          # damaged files raise nearly anything
                    self.unreadable[j] = True
                    print(f"unreadable image no. {int(self.unreadable.sum())}: {self.path(j)} "
                          f"({error}); another of its class takes its place", file=sys.stderr)
        raise BadInput(f"no image of the class of {self.path(i)} can be read: remove this class")


def decode(path):
    """An image file -> a Pillow image in RGB, upright, on white where it was transparent.
    Raises nearly anything for damaged files and decompression bombs."""
    with Image.open(path, formats=FORMATS) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):              # 16 bits, which convert() would clip
            grey = np.minimum(np.asarray(image) // 257, 255)
            image = Image.fromarray(grey.astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
