"""CIFAR-10 (Krizhevsky, 2009): 60,000 images of 32x32 pixels in ten classes.

Reads the official binary files, or those of the Python version, which torchvision leaves,
from a folder or an archive. Each of the six files holds 10,000 images: a label and a red, a
green and a blue plane. If there are none, the binary archive (170 MB) is downloaded.
"""
import codecs
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np

from engine import BadInput
from engine.checkpoints import DOWNLOADS, download

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
PER_FILE = 10_000
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def load(split, *, data_dir=None, size=None):
    """One split, in memory: (images uint8 (N, 32, 32, 3), labels int64 (N,), class names).

    split: "train" (N = 50,000) or "test" (10,000). data_dir: where the files, their folder or
    an archive are (default: data/downloads/). Raises BadInput if the data are damaged or
    cannot be downloaded."""
    if size not in (None, 32):
        raise BadInput(f"CIFAR-10 images are 32x32: leave the size out or give 32, not {size}")
    root = Path(data_dir or DOWNLOADS).expanduser()
    try:
        pixels, labels = zip(*[_parse(*file) for file in _read(root, FILES[split])])
        planes = np.concatenate(pixels).reshape(len(labels) * PER_FILE, 3, 32, 32)
        labels = np.concatenate(labels)
        if len(labels) != len(planes) or labels.max() > 9:
            raise ValueError(f"{len(labels)} labels up to {labels.max()}")
    except Exception as error:          # damaged archives and pickles raise nearly anything
        raise BadInput(f"cannot read CIFAR-10 in {root}: {error!r}") from None
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels, [*CLASSES]


def examples():
    """Four test images of each class, shipped with the code (from JPEG copies). -> as load()"""
    with np.load(Path(__file__).with_name("cifar10_held_out.npz")) as file:
        return file["images"], file["labels"], [*CLASSES]


def _read(root, names):
    """Find these files in a folder or an archive. -> [(file name, bytes)]"""
    for place in ("{}.bin", "cifar-10-batches-bin/{}.bin", "{}", "cifar-10-batches-py/{}"):
        paths = [root / place.format(name) for name in names]
        if all(path.is_file() for path in paths):
            return [(path.name, path.read_bytes()) for path in paths]
    archives = [root, root / "cifar-10-python.tar.gz", root / "cifar-10-binary.tar.gz"]
    archive = next((path for path in archives if path.is_file()), archives[-1])
    with tarfile.open(download(URL, archive, SHA256)) as tar:
        members = [x for x in tar if Path(x.name).stem in names]
        if len(members) < len(names):
            raise ValueError(f"{archive.name} lacks {', '.join(names)}")
        return sorted((Path(x.name).name, tar.extractfile(x).read()) for x in members)


def _parse(name, raw):
    """The bytes of a file -> pixels uint8 (10000, 3072), labels int64 (10000,)"""
    if name.endswith(".bin"):
        records = np.frombuffer(raw, np.uint8).reshape(-1, 1 + 3072)
        return records[:, 1:], records[:, 0].astype(np.int64)
    batch = PlainUnpickler(io.BytesIO(raw), encoding="bytes").load()
    return batch[b"data"], np.array(batch[b"labels"], np.int64)


class PlainUnpickler(pickle.Unpickler):
    """Loads plain values and numpy arrays only, because other pickles can run any program.
    Modules are ignored: numpy has renamed its own (numpy.core became numpy._core)."""
    allowed = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray,
               "dtype": np.dtype, "encode": codecs.encode}

    def find_class(self, module, name):
        if name not in self.allowed:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}")
        return self.allowed[name]
