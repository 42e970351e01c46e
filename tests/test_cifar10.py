"""CIFAR-10: the official records, fetched once, whose archive is checked."""
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from test_files import hub                                 # noqa: F401
from test_folder import refusal

from data import cifar10


@pytest.fixture
def small(monkeypatch):
    """Files of 20 records instead of 10,000. -> {path in the archive: its bytes}"""
    monkeypatch.setattr(cifar10, "PER_FILE", 20)
    rng, members = np.random.default_rng(0), {}
    for name in cifar10.FILES["train"] + cifar10.FILES["test"]:
        records = rng.integers(0, 256, (20, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        members[f"{cifar10.FOLDER}/{name}"] = records.tobytes()
    return members


def packed(monkeypatch, members):
    """-> the bytes of an archive that from now on is the official one"""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", hashlib.sha256(buffer.getvalue()).hexdigest())
    return buffer.getvalue()


@pytest.mark.parametrize("where", [".", cifar10.FOLDER])
def test_records_are_red_green_and_blue_planes(small, tmp_path, where):
    (tmp_path / where).mkdir(exist_ok=True)
    for name, body in small.items():
        (tmp_path / where / name.split("/")[1]).write_bytes(body)
    images, labels, names = cifar10.load("train", data_dir=tmp_path, size=32)
    assert images.shape == (100, 32, 32, 3) and images.dtype == np.uint8
    assert images.flags.c_contiguous and labels.shape == (100,) and labels.dtype == np.int64
    assert names[0] == "airplane" and names[9] == "truck" and len(names) == 10
    for n in (0, 19, 20, 99):   # byte by byte, straight from the description of the format
        record = small[f"{cifar10.FOLDER}/data_batch_{n // 20 + 1}.bin"][n % 20 * 3073:][:3073]
        assert labels[n] == record[0]
        for y, x, c in ((0, 0, 0), (0, 5, 1), (7, 0, 2), (31, 31, 2)):
            assert images[n, y, x, c] == record[1 + 1024 * c + 32 * y + x]
    assert len(cifar10.load("test", data_dir=str(tmp_path))[0]) == 20


def test_it_is_fetched_once_checked_and_what_is_missing_is_unpacked_again(
        small, hub, tmp_path, monkeypatch):                # noqa: F811
    monkeypatch.setattr(cifar10, "URL", f"{hub.url}c.tar.gz")
    hub.files["c.tar.gz"] = b"another file"
    archive, path = packed(monkeypatch, small), tmp_path / "new" / cifar10.ARCHIVE
    first = path.parent / cifar10.FOLDER / "data_batch_1.bin"
    refusal(lambda: cifar10.load("test", data_dir=path.parent), cifar10.URL, str(path), "sha256")
    hub.files["c.tar.gz"] = archive
    for _ in range(2):
        assert len(cifar10.load("train", data_dir=path.parent)[0]) == 100 and len(hub.seen) == 2
        assert {file.name for file in first.parent.iterdir()} == {
            Path(name).name for name in small} and path.read_bytes() == archive
        first.unlink()
    path.write_bytes(archive[:-1] + b"x")
    refusal(lambda: cifar10.load("train", data_dir=path.parent), str(path), "damaged")


def test_damaged_files_and_wrong_options_are_refused(small, tmp_path):
    def refused(*words, split="train", root=tmp_path, **options):
        refusal(lambda: cifar10.load(split, data_dir=root, **options), *words)
    for name, body in small.items():
        (tmp_path / Path(name).name).write_bytes(body)
    test = tmp_path / "test_batch.bin"                     # `body` is what it should hold
    for damage, word in ((body[:-7], "61453"), (b"\x0b" + body[1:], "label 11")):
        test.write_bytes(damage)
        refused(str(test), word, split="test")
    (tmp_path / "data_batch_3.bin").unlink()
    refused("lacks data_batch_3.bin")
    refused("32x32", "64", size=64)
    refused("'val'", split="val")
    refused(str(test), root=test)
