"""CIFAR-10: the official records, fetched once, from archives that may be damaged or hostile."""
import gzip
import hashlib
import io
import tarfile

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


def accepted(monkeypatch, archive):
    """These bytes are the official archive from now on."""
    monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", hashlib.sha256(archive).hexdigest())
    return archive


def packed(monkeypatch, members, links=()):
    """-> the bytes of an archive that from now on is the official one"""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, 20 * 3073   # the size lies
            tar.addfile(info)
    return accepted(monkeypatch, buffer.getvalue())


def files_in(root):
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


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
        assert len(files_in(path.parent)) == 7 and path.read_bytes() == archive
        first.unlink()
    path.write_bytes(archive[:-1] + b"x")
    refusal(lambda: cifar10.load("train", data_dir=path.parent), str(path), "damaged")


def test_hostile_archives_write_nothing_elsewhere(small, tmp_path, monkeypatch):
    first, secret = f"{cifar10.FOLDER}/data_batch_1.bin", tmp_path / "secret"
    rest = {name: body for name, body in small.items() if name != first}
    secret.write_bytes(bytes(20 * 3073))
    stray = {"../evil": b"e", str(tmp_path / "evil"): b"e", f"{cifar10.FOLDER}/../../evil": b"e"}
    for number, (members, links, complaint) in enumerate([
            ({**stray, **small}, [], None),
            (rest, [(first, str(secret), tarfile.SYMTYPE)], "plain file"),
            (rest, [(first, "../../secret", tarfile.LNKTYPE)], "plain file"),
            ({**rest, first: small[first][:-1]}, [], "plain file"),
            (rest, [], "lacks"),
            # A folder that is a link out of the way: members below it are not followed blindly.
            ({}, [(cifar10.FOLDER, str(tmp_path), tarfile.SYMTYPE)], "lacks")]):
        root = tmp_path / "inner" / str(number)
        root.mkdir(parents=True)
        (root / cifar10.ARCHIVE).write_bytes(packed(monkeypatch, members, links))
        if complaint:
            refusal(lambda: cifar10.load("train", data_dir=root), complaint)
        else:
            assert len(cifar10.load("train", data_dir=root)[0]) == 100
        assert not [f for f in files_in(tmp_path) if "evil" in f or "tmp" in f]
        assert not any(p.is_symlink() for p in root.rglob("*"))


def test_damaged_files_and_wrong_options_are_refused(small, tmp_path, monkeypatch):
    def refused(*words, split="train", root=tmp_path, **options):
        refusal(lambda: cifar10.load(split, data_dir=root, **options), *words)
    whole, path = packed(monkeypatch, small), tmp_path / cifar10.ARCHIVE
    for archive in (whole[:len(whole) // 2], gzip.compress(b"not a tar")):
        path.write_bytes(accepted(monkeypatch, archive))
        refused("damaged")
    path.unlink()
    for name, body in small.items():
        (tmp_path / name.split("/")[1]).write_bytes(body)
    test = tmp_path / "test_batch.bin"                     # `body` is what it should hold
    for damage, word in ((body[:-7], "61453"), (b"\x0b" + body[1:], "label 11")):
        test.write_bytes(damage)
        refused(str(test), word, split="test")
    (tmp_path / "data_batch_3.bin").unlink()
    refused("lacks data_batch_3.bin")
    refused("32x32", "64", size=64)
    refused("'val'", split="val")
    refused(str(test), root=test)
