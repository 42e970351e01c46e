"""CIFAR-10 (Krizhevsky, 2009): 60,000 images of 32x32 pixels in ten classes.

Reads the official binary layout: six files of 10,000 records, each 1 label byte and 3072 pixel
bytes (a red, a green and a blue plane). The archive, 170 MB, is downloaded once and checked.
"""
import tarfile
from pathlib import Path

import numpy as np

from engine import BadInput, files

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE = "cifar-10-binary.tar.gz"
ARCHIVE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
FOLDER = "cifar-10-batches-bin"
FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
PER_FILE, RECORD = 10_000, 1 + 3 * 32 * 32   # records in a file, bytes in a record
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def load(split, *, data_dir=None, size=None):
    """One split, in memory: (images uint8 (N, 32, 32, 3), labels int64 (N,), class names).

    split: "train" (N = 50,000) or "test" (10,000). data_dir holds the .bin files, or the folder
    cifar-10-batches-bin, or the archive; if none of them is there, the archive is downloaded to it
    (default: data/downloads/). Raises BadInput if the data cannot be had or is wrong.
    """
    if split not in FILES:
        raise BadInput(f"CIFAR-10 has the splits train and test, not {split!r}")
    if size not in (None, 32):
        raise BadInput(f"CIFAR-10 images are 32x32: leave the size out or give 32, not {size}")
    root = Path(data_dir).expanduser() if data_dir else files.DOWNLOADS
    try:
        folder = _find_or_fetch(root, FILES[split])
        images, labels = zip(*[_read(folder / name) for name in FILES[split]])
    except OSError as error:   # no permission, disk full, a file where a folder should be
        raise BadInput(f"cannot use {root} for CIFAR-10: {error}") from error
    return np.concatenate(images), np.concatenate(labels), [*CLASSES]


def examples():
    """Four test images of each class, which come with the code (from JPEG copies). -> as load()"""
    with np.load(Path(__file__).with_name("cifar10_held_out.npz")) as file:
        return file["images"], file["labels"], [*CLASSES]


def _find_or_fetch(root, names):
    archive = root / ARCHIVE
    for folder in (root, root / FOLDER):
        missing = [name for name in names if not (folder / name).is_file()]
        if not missing:
            return folder
        if len(missing) < len(names) and not archive.is_file():   # never mix ours into theirs
            raise BadInput(f"{folder} lacks {missing[0]}: add it, or put {ARCHIVE} in {root}")
    if not archive.is_file():
        files.download(URL, archive, ARCHIVE_SHA256)
    elif files.sha256_of(archive) != ARCHIVE_SHA256:
        raise BadInput(f"{archive} is damaged, its sha256 is wrong: remove it, then it is fetched "
                       "again")
    return _unpack(archive, root / FOLDER)


def _unpack(archive, folder):
    """The six files of the archive, whose sha256 has been checked."""
    wanted = {f"{FOLDER}/{name}": name for names in FILES.values() for name in names}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.name in wanted:
                with files.written_whole(folder / wanted[member.name]) as out:
                    out.write(tar.extractfile(member).read())
    return folder


def _read(path):
    if (found := path.stat().st_size) != PER_FILE * RECORD:
        raise BadInput(f"{path} has {found} bytes, not {PER_FILE * RECORD}: it is damaged")
    records = np.fromfile(path, np.uint8).reshape(PER_FILE, RECORD)
    if (worst := records[:, 0].max()) >= len(CLASSES):
        raise BadInput(f"{path} holds the label {worst}, but labels are 0..9: it is damaged")
    planes = records[:, 1:].reshape(PER_FILE, 3, 32, 32)
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))   # (N, 32, 32, 3)
    return images, records[:, 0].astype(np.int64)
