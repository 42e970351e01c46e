"""The readers of CIFAR-10, folders of pictures, and ImageNet: what they return and refuse."""
import contextlib
import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import struct
import tarfile
import tempfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import EpsImagePlugin, Image

from data import batches, cifar10, folder, imagenet, registry
from engine import BadInput

# ---------------------------------------------------------------------------- CIFAR-10


@pytest.fixture
def small(monkeypatch):
    """Batches of 20 records instead of 10,000; returns the archive's bytes and what is in it."""
    monkeypatch.setattr(cifar10, "PER_FILE", 20)
    rng = np.random.default_rng(0)
    files = {}
    for name in cifar10.FILES["train"] + cifar10.FILES["test"]:
        records = rng.integers(0, 256, (20, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        files[name] = records.tobytes()
    archive = make_archive({f"{cifar10.FOLDER}/{name}": body for name, body in files.items()})
    accept(monkeypatch, archive)
    return archive, files


def accept(monkeypatch, archive):
    """From now on this is the official archive."""
    monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", hashlib.sha256(archive).hexdigest())


def make_archive(members, links=()):
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
    return buffer.getvalue()


@pytest.fixture
def serve(monkeypatch):
    """serve(body, promised, status): a web server on this machine; returns the list of requests."""
    servers = []

    def start(body, promised=None, status=200):
        seen = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(promised or len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):   # the reader may hang up early
                    self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(cifar10, "URL", f"http://127.0.0.1:{server.server_port}/c.tar.gz")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        return seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def refused(call, *words):
    """`call` raises BadInput, in one line that holds all the words."""
    with pytest.raises(BadInput) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


def files_in(root):
    return sorted(p.relative_to(root).as_posix() for p in Path(root).rglob("*") if p.is_file())


@pytest.mark.parametrize("where", [".", cifar10.FOLDER])
def test_cifar10_reads_records_as_red_green_blue_planes(small, tmp_path, where):
    (tmp_path / where).mkdir(exist_ok=True)
    for name, body in small[1].items():
        (tmp_path / where / name).write_bytes(body)
    images, labels, names = cifar10.load("train", data_dir=tmp_path, size=32)
    assert images.shape == (100, 32, 32, 3) and images.dtype == np.uint8
    assert images.flags.c_contiguous and images.flags.writeable
    assert labels.shape == (100,) and labels.dtype == np.int64
    assert names[0] == "airplane" and names[9] == "truck" and len(names) == 10
    for n in (0, 19, 20, 99):   # byte by byte, straight from the description of the format
        record = small[1][f"data_batch_{n // 20 + 1}.bin"][n % 20 * 3073:][:3073]
        assert labels[n] == record[0]
        for y, x, c in ((0, 0, 0), (0, 5, 1), (7, 0, 2), (31, 31, 2)):
            assert images[n, y, x, c] == record[1 + 1024 * c + 32 * y + x]
    assert len(cifar10.load("test", data_dir=str(tmp_path))[0]) == 20


def test_cifar10_downloads_once_and_leaves_only_whole_files(small, serve, tmp_path, capsys):
    seen = serve(small[0])
    root = tmp_path / "new"
    images, labels, _ = cifar10.load("test", data_dir=root)
    again, _, _ = cifar10.load("test", data_dir=root)
    cifar10.load("train", data_dir=root)
    assert (images == again).all() and len(seen) == 1
    assert bytes([labels[3]]) == small[1]["test_batch.bin"][3 * 3073:][:1]
    assert len(files_in(root)) == 7 and not [f for f in files_in(root) if "part" in f]
    assert f"downloading {cifar10.URL}" in capsys.readouterr().out


def test_cifar10_uses_an_archive_that_is_already_there(small, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "URL", "http://127.0.0.1:9/never")
    (tmp_path / cifar10.ARCHIVE).write_bytes(small[0])
    assert len(cifar10.load("train", data_dir=tmp_path)[0]) == 100


def test_cifar10_unpacks_again_what_an_interruption_left_out(small, tmp_path):
    (tmp_path / cifar10.ARCHIVE).write_bytes(small[0])
    (tmp_path / cifar10.FOLDER).mkdir()
    name = "data_batch_1.bin"
    (tmp_path / cifar10.FOLDER / name).write_bytes(small[1][name])
    assert len(cifar10.load("train", data_dir=tmp_path)[0]) == 100


def test_cifar10_refuses_another_file_and_says_where_to_put_the_right_one(small, serve, tmp_path):
    serve(b"y" * len(small[0]))
    where = str(tmp_path / cifar10.ARCHIVE)
    refused(lambda: cifar10.load("train", data_dir=tmp_path), cifar10.URL, where, "sha256",
            cifar10.ARCHIVE_SHA256)
    assert files_in(tmp_path) == [f"{cifar10.ARCHIVE}.lock"]
    (tmp_path / cifar10.ARCHIVE).write_bytes(b"x" * 999)
    refused(lambda: cifar10.load("train", data_dir=tmp_path), where, cifar10.ARCHIVE_SHA256)


def test_cifar10_hostile_archives_write_nothing_elsewhere(small, tmp_path, monkeypatch):
    good = {f"{cifar10.FOLDER}/{name}": body for name, body in small[1].items()}
    first = f"{cifar10.FOLDER}/data_batch_1.bin"
    rest = {name: body for name, body in good.items() if name != first}
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(20 * 3073))
    stray = {"../evil": b"e", str(tmp_path / "evil"): b"e", f"{cifar10.FOLDER}/../../evil": b"e"}
    cases = [
        (make_archive({**stray, **good}), None),
        (make_archive(rest, [(first, str(secret), tarfile.SYMTYPE)]), "plain file"),
        (make_archive(rest, [(first, "../../secret", tarfile.LNKTYPE)]), "plain file"),
        (make_archive(rest, [(first, "data_batch_2.bin", tarfile.SYMTYPE)]), "plain file"),
        (make_archive({**rest, first: good[first][:-1]}), "plain file"),
        (make_archive(rest), "lacks"),
        (small[0][:len(small[0]) // 2], "damaged"),
        (gzip.compress(b"not a tar"), "damaged"),
        (b"not even gzip", "damaged"),
        # A folder that is a link out of the way: members below it are not followed blindly.
        (make_archive({}, [(cifar10.FOLDER, str(tmp_path), tarfile.SYMTYPE)]), "lacks"),
    ]
    for number, (archive, complaint) in enumerate(cases):
        accept(monkeypatch, archive)
        root = tmp_path / "inner" / str(number)
        root.mkdir(parents=True)
        (root / cifar10.ARCHIVE).write_bytes(archive)
        if complaint:
            refused(lambda: cifar10.load("train", data_dir=root), complaint)
        else:
            assert len(cifar10.load("train", data_dir=root)[0]) == 100
        assert not [f for f in files_in(tmp_path) if "evil" in f or "part" in f]
        assert not any(p.is_symlink() for p in root.rglob("*"))


def test_cifar10_refuses_damaged_batches(small, tmp_path):
    for name, body in small[1].items():
        (tmp_path / name).write_bytes(body)
    test = tmp_path / "test_batch.bin"
    test.write_bytes(small[1]["test_batch.bin"][:-7])
    refused(lambda: cifar10.load("test", data_dir=tmp_path), str(test), "61453", "61460")
    test.write_bytes(b"\x0b" + small[1]["test_batch.bin"][1:])
    refused(lambda: cifar10.load("test", data_dir=tmp_path), str(test), "label 11")
    (tmp_path / "data_batch_3.bin").unlink()
    refused(lambda: cifar10.load("train", data_dir=tmp_path), "lacks data_batch_3.bin")


def test_cifar10_refuses_bad_options(tmp_path):
    (tmp_path / "file").write_text("")
    refused(lambda: cifar10.load("train", data_dir=tmp_path, size=64), "32x32", "64")
    refused(lambda: cifar10.load("val", data_dir=tmp_path), "train", "'val'")
    refused(lambda: cifar10.load("train", data_dir=tmp_path / "file"), str(tmp_path / "file"))


# ---------------------------------------------------------------------------- folders


def write(path, colour=(200, 100, 50), size=(20, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(colour)).save(path, **options)
    return path


def only(path, size=16):
    """The reader's view of a folder that holds one readable picture."""
    return folder.load("train", data_dir=path.parent, size=size)[0]


GREY, RGB = (120, 120, 120), (200, 100, 50)


def solid(mode):
    """-> (picture of one colour in this mode, ending, what RGB it is)."""
    if mode in ("P", "P transparent", "PA-like gif"):
        image = Image.new("P", (20, 16), 1)
        image.putpalette([0, 0, 0, *RGB])
        if mode != "P":   # colour 1 is see-through, so the white behind it shows
            image.info["transparency"] = 1
            return image, "gif" if "gif" in mode else "png", (255, 255, 255)
        return image, "png", RGB
    deep = np.full((16, 20), 120 * 257)
    return {
        "1": lambda: (Image.new("1", (20, 16), 1), "png", (255, 255, 255)),
        "L": lambda: (Image.new("L", (20, 16), 120), "jpg", GREY),
        "LA": lambda: (Image.new("LA", (20, 16), (0, 102)), "png", (153, 153, 153)),
        "RGBA": lambda: (Image.new("RGBA", (20, 16), (*RGB, 51)), "webp", (244, 224, 214)),
        "RGB": lambda: (Image.new("RGB", (20, 16), RGB), "jp2", RGB),
        "CMYK": lambda: (Image.new("CMYK", (20, 16), (55, 155, 205, 0)), "jpg", RGB),
        "CMYK tiff": lambda: (Image.new("CMYK", (20, 16), (55, 155, 205, 0)), "tif", RGB),
        "YCbCr": lambda: (Image.new("RGB", (20, 16), RGB).convert("YCbCr"), "tif", RGB),
        "I;16 png": lambda: (Image.fromarray(deep.astype(np.uint16)), "png", GREY),
        "I;16 tiff": lambda: (Image.fromarray(deep.astype(np.uint16)), "tiff", GREY),
        "I pgm": lambda: (Image.fromarray(deep.astype(np.int32)), "pgm", GREY),
        "I of 32 bits": lambda: (Image.fromarray((deep * 32768).astype(np.int32)), "tif", GREY),
        "F of 1": lambda: (Image.fromarray((deep / 65535).astype(np.float32)), "tif", GREY),
        "F of 255": lambda: (Image.fromarray((deep / 257).astype(np.float32)), "tif", GREY),
        "F of 65535": lambda: (Image.fromarray(deep.astype(np.float32)), "tif", GREY),
    }[mode]()


@pytest.mark.parametrize("mode", [
    "1", "L", "LA", "P", "P transparent", "PA-like gif", "RGB", "RGBA", "CMYK", "CMYK tiff",
    "YCbCr", "I;16 png", "I;16 tiff", "I pgm", "I of 32 bits", "F of 1", "F of 255", "F of 65535"])
def test_folder_reads_every_mode_in_its_true_colours(tmp_path, mode):
    image, ending, expected = solid(mode)
    image.save(tmp_path / f"a.{ending}", lossless=True)
    seen = only(tmp_path / "a")[0]
    assert seen.shape == (16, 16, 3) and seen.dtype == np.uint8 and seen.flags.writeable
    np.testing.assert_allclose(seen.reshape(-1, 3).mean(0), expected, atol=3)
    assert np.ptp(seen.reshape(-1, 3), axis=0).max() <= 3


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_keeps_its_gradient(tmp_path, ending):
    ramp = np.tile(np.linspace(0, 65535, 144).astype(np.uint16), (144, 1))
    Image.fromarray(ramp).save(tmp_path / f"a.{ending}")
    row = only(tmp_path / "a", size=128)[0][64, :, 0].astype(int)   # 128 of 144 columns, as stored
    np.testing.assert_allclose(row, ramp[0, 8:136] / 257, atol=1)
    assert (np.diff(row) >= 0).all() and len(set(row)) > 100


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending, size", [("jpg", 16), ("jpg", 256), ("tif", 16)])
def test_exif_orientation_puts_the_picture_upright(tmp_path, orientation, ending, size):
    upright = np.zeros((400, 600, 3), np.uint8)
    upright[:200, :300], upright[:200, 300:], upright[200:, :300] = (250, 0, 0), (0, 250, 0), 90
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}   # values of Image.Transpose, inverted
    image = Image.fromarray(upright)
    if orientation > 1:
        image = image.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{ending}", exif=exif)
    seen, q = only(tmp_path / "a", size=size)[0].astype(int), size // 4
    for (y, x), colour in {(q, q): (250, 0, 0), (q, -q): (0, 250, 0), (-q, q): (90, 90, 90),
                           (-q, -q): (0, 0, 0)}.items():
        assert np.abs(seen[y, x] - colour).max() < 12


def test_broken_notes_about_a_picture_do_not_lose_it(tmp_path):
    write(tmp_path / "a.jpg", exif=b"Exif\0\0garbage that is no header")
    assert abs(int(only(tmp_path / "a")[0][8, 8, 0]) - 200) < 4


def test_unreadable_files_are_skipped_and_named_once(tmp_path, capsys, monkeypatch):
    write(tmp_path / "val" / "a" / "0.png")
    tmp_path /= "train"
    for n, colour in enumerate(((10, 10, 10), (60, 60, 60), (110, 110, 110))):
        write(tmp_path / "a" / f"{3 * n}.png", colour)   # 0, 3, 6
    write(tmp_path / "b" / "0.png", (210, 210, 210))
    whole = write(tmp_path / "whole.jpg", size=(200, 200)).read_bytes()
    (tmp_path / "whole.jpg").unlink()
    (tmp_path / "a" / "1.jpg").write_bytes(b"")
    (tmp_path / "a" / "2.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "a" / "4.jpg").write_text("<html>not found</html>")
    (tmp_path / "a" / "7.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "a" / "notes.txt").write_text("not even listed")
    write(tmp_path / "a" / "5.png", size=(300, 300))   # a decompression bomb, by today's measure
    monkeypatch.setattr(folder, "MAX_PIXELS", 200 * 200)
    images, labels, names = folder.load("train", data_dir=tmp_path.parent, size=16)
    grey = [int(images[i][0, 0, 0]) for i in range(len(images))]
    assert names == ["a", "b"] and labels.tolist() == [0] * 8 + [1]
    #       0.png  1 -> 3  2 -> 3  3   4 -> 6  5 -> 6  6.png  7 -> 0  b
    assert grey == [10, 60, 60, 60, 110, 110, 110, 10, 210]
    bad = [Path(images.path(i)).name for i in np.flatnonzero(images.bad)]
    assert bad == ["1.jpg", "2.jpg", "4.jpg", "5.png", "7.jpg"]
    [images.crops(i, [5])[0] for i in range(len(images))]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and all(x.startswith("skipped unreadable image ") for x in lines)
    assert [images.path(i) for i in (0, 8)] == [str(tmp_path / p) for p in ("a/0.png", "b/0.png")]


def test_disguised_postscript_reaches_no_interpreter(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: started.append(args))
    write(tmp_path / "val" / "a" / "b.png")
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.new("RGB", (20, 16)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "train" / "a" / "a.jpg")
    refused(lambda: folder.load("train", data_dir=tmp_path, size=8), "can be read")
    assert not started


def test_a_class_without_readable_pictures_borrows_and_an_unreadable_folder_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    for n in range(3):
        (tmp_path / "a" / f"{n}.jpg").write_bytes(b"no picture")
    refused(lambda: folder.load("train", data_dir=tmp_path, size=8), "none of the 2", str(tmp_path))
    write(tmp_path / "b" / "0.png", (1, 2, 3))
    assert folder.load("train", data_dir=tmp_path, size=8)[0][0][0, 0].tolist() == [1, 2, 3]


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """One 90 x 61 picture of noise, as the reader sees it at 32 pixels, and as it is."""
    path = tmp_path_factory.mktemp("noise") / "n.png"
    picture = np.random.default_rng(1).integers(0, 256, (61, 90, 3), dtype=np.uint8)
    Image.fromarray(picture).save(path)
    return only(path, size=32), Image.fromarray(picture)


@given(seed=st.integers(0, 2 ** 63 - 1), size=st.integers(1, 40))
def test_crops_are_those_of_the_whole_resized_picture_and_repeat(noise, seed, size):
    images = folder.FolderImages(noise[0].root, ["n.png"], [0], size)
    short = round(1.125 * size)
    whole = np.asarray(noise[1].resize((round(90 * short / 61), short), Image.Resampling.LANCZOS))
    crop = images.crops(0, [seed])[0]
    assert (crop == pickle.loads(pickle.dumps(images)).crops(0, [seed])[0]).all()
    views = np.lib.stride_tricks.sliding_window_view(whole, (size, size, 3))[:, :, 0]
    apart = np.abs(views.astype(int) - crop).max(axis=(2, 3, 4))
    assert apart.min() <= 2   # the slow way: resize everything, then cut
    top, left = (whole.shape[0] - size + 1) // 2, (whole.shape[1] - size + 1) // 2
    assert np.abs(whole[top:top + size, left:left + size].astype(int) - images[0]).max() <= 2


def test_crops_reach_everywhere_and_differ(noise):
    images = noise[0]
    crops = {images.crops(0, [seed])[0].tobytes() for seed in range(800)}
    assert len(crops) > 90   # 5 rows x 22 columns of places = 110
    twice = folder.FolderImages(images.root, ["n.png"] * 30, [0] * 30, 32)
    # One seed, many pictures.
    assert len({twice.crops(i, [7])[0].tobytes() for i in range(30)}) > 15


@pytest.mark.parametrize("w, h", [(1, 500), (500, 1), (1, 1), (3, 40000)])
def test_extreme_shapes(tmp_path, w, h):
    write(tmp_path / "a.png", size=(w, h))
    images = only(tmp_path / "a", size=64)
    for seen in (images[0], images.crops(0, [1])[0]):
        assert seen.shape == (64, 64, 3) and (seen == (200, 100, 50)).all()


def test_quick_jpeg_decoding_does_not_shift_the_picture(tmp_path):
    """At 1/2 to 1/8 scale the last column is partial: 999 pixels become 124.9, not 125."""
    y, x = np.mgrid[:745, :999]
    waves = [np.sin(x / 40) + 0.2 * np.sin(x * y / 999), np.sin(y / 40), x % 9 / 99]
    picture = Image.fromarray((127 + 100 * np.stack(waves, -1)).astype(np.uint8))
    picture.save(tmp_path / "a.jpg", quality=95)
    for size in (32, 64, 128):
        short = round(1.125 * size)
        whole = Image.open(tmp_path / "a.jpg").resize((round(999 * short / 745), short),
                                                      Image.Resampling.LANCZOS)
        top, left = (whole.height - size + 1) // 2, (whole.width - size + 1) // 2
        slow = np.asarray(whole.crop((left, top, left + size, top + size))).astype(int)
        assert np.abs(only(tmp_path / "a", size=size)[0] - slow).mean() < 0.6


def test_index_errors_and_workers(tmp_path):
    for n in range(5):
        write(tmp_path / f"{n}.png", (n * 50, 0, 0))
    images, labels, names = folder.load("train", data_dir=tmp_path, size=8)
    assert names == [tmp_path.name] and labels.tolist() == [0] * 4 == [0] * len(images)
    shades = [int(image[0, 0, 0]) for image in images]
    assert shades == sorted(set(shades))
    assert len(list(images)) == 4 and (images[-1] == images[3]).all()
    for wrong in (4, -5):
        with pytest.raises(IndexError):
            images[wrong]
    loader = torch.utils.data.DataLoader(images, batch_size=2, num_workers=1)
    assert [b[:, 0, 0, 0].tolist() for b in loader] == [shades[:2], shades[2:]]


# ---------------------------------------------------------------------------- splits


@given(sizes=st.lists(st.integers(1, 45), min_size=1, max_size=4))
def test_held_out_pictures_are_disjoint_complete_and_spread(sizes):
    with tempfile.TemporaryDirectory() as root:
        picture = write(Path(root) / "seed.png", size=(2, 2)).read_bytes()
        (Path(root) / "seed.png").unlink()
        for k, n in enumerate(sizes):
            (Path(root) / f"c{k}").mkdir()
            for i in range(n):
                (Path(root) / f"c{k}" / f"{i:02}.png").write_bytes(picture)
        if sum(sizes) == 1:
            refused(lambda: folder.load("test", data_dir=root, size=2), "one image")
            return
        train, test = (folder.load(s, data_dir=root, size=2) for s in ("train", "test"))
        paths = [[Path(x.path(i)).relative_to(root).as_posix() for i in range(len(x))]
                 for x in (train[0], test[0])]
        assert not set(paths[0]) & set(paths[1])
        assert sorted(paths[0] + paths[1]) == files_in(root)
        assert train[2] == test[2] == [f"c{k}" for k in range(len(sizes))]
        for (_, labels, names), listed in zip((train, test), paths):
            assert [names[k] for k in labels] == [p.split("/")[0] for p in listed]
        counts = [paths[1][j].split("/")[0] for j in range(len(paths[1]))]
        if max(sizes) > 1:
            for k, n in enumerate(sizes):
                assert int(n > 1) <= counts.count(f"c{k}") <= n // 2
        else:
            assert len(paths[1]) == 1


def test_single_pictures_per_class_are_split_as_one_list(tmp_path):
    for k in range(41):
        write(tmp_path / f"c{k:02}" / "x.png", size=(2, 2))
    images, labels, names = folder.load("test", data_dir=tmp_path, size=2)
    assert labels.tolist() == [6, 19, 23, 40], "on every machine the same"
    assert len(names) == 41 and images.path(1).endswith("c19/x.png")


@pytest.mark.parametrize("other", ["val", "valid", "test"])
def test_ready_made_splits_are_kept(tmp_path, other):
    for n in range(3):
        write(tmp_path / "train" / "äpfel und birnen" / f"{n} ü.png", size=(2, 2))
        write(tmp_path / "train" / "zebra" / f"{n}.PNG", size=(2, 2))
    write(tmp_path / other / "zebra" / "v.png", (9, 9, 9), size=(2, 2))
    write(tmp_path / "train" / "__MACOSX" / "x.png")
    write(tmp_path / "train" / ".hidden" / "x.png")
    write(tmp_path / "train" / "zebra" / "._0.png")
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "devkit").mkdir()
    images, labels, names = folder.load("train", data_dir=tmp_path, size=2)
    assert names == ["zebra", "äpfel und birnen"] and labels.tolist() == [0] * 3 + [1] * 3
    assert images.path(5).endswith("2 ü.png") and not images.skipped()
    images, labels, names = folder.load("test", data_dir=tmp_path, size=2)
    assert labels.tolist() == [0] and images[0][0, 0].tolist() == [9, 9, 9] and len(names) == 2
    write(tmp_path / other / "yak" / "v.png")
    refused(lambda: folder.load("test", data_dir=tmp_path), "'yak'", "train")
    shutil.rmtree(tmp_path / other)
    write(tmp_path / other / "v.png")
    refused(lambda: folder.load("test", data_dir=tmp_path), "outside class folders", other)


def test_train_alone_is_split_and_train_may_be_a_class(tmp_path):
    for n in range(2):
        write(tmp_path / "one" / "train" / "cat" / f"{n}.png", size=(2, 2))
        write(tmp_path / "two" / "train" / f"{n}.png", size=(2, 2))
        write(tmp_path / "two" / "car" / f"{n}.png", size=(2, 2))
    assert folder.load("test", data_dir=tmp_path / "one", size=2)[2] == ["cat"]
    assert folder.load("test", data_dir=tmp_path / "two", size=2)[2] == ["car", "train"]


def test_links_to_class_folders_are_followed(tmp_path):
    for n in range(2):
        write(tmp_path / "far" / f"{n}.png", size=(2, 2))
    (tmp_path / "near").mkdir()
    os.symlink(tmp_path / "far", tmp_path / "near" / "cat")
    os.symlink(tmp_path / "gone", tmp_path / "near" / "dog")
    assert folder.load("train", data_dir=tmp_path / "near", size=2)[2] == ["cat"]


def test_loose_pictures_beside_class_folders_are_mentioned(tmp_path, capsys):
    write(tmp_path / "cat" / "0.png", size=(2, 2))
    write(tmp_path / "loose.png")
    assert len(folder.load("train", data_dir=tmp_path, size=2)[0]) == 1
    assert "ignored images outside" in capsys.readouterr().err


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file.png").write_text("")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    refused(lambda: folder.load("train", data_dir=None), "--data-dir")
    refused(lambda: folder.load("train", data_dir=tmp_path / "gone"), "gone", "No such")
    refused(lambda: folder.load("train", data_dir=tmp_path / "file.png"), "Not a directory")
    refused(lambda: folder.load("train", data_dir=tmp_path / "empty"), "no images", "<class>")
    refused(lambda: folder.load("dev", data_dir=tmp_path), "'dev'")


# ---------------------------------------------------------------------------- ImageNet


def test_sorted_wnids_are_the_official_order():
    wnids = [wnid for wnid, _ in imagenet._table()]
    assert len(wnids) == 1000 and wnids == sorted(set(wnids))
    names = imagenet.class_names()
    assert (names[0], names[1], names[207], names[999]) == (
        "tench", "goldfish", "golden retriever", "toilet tissue")


def test_imagenet_subset_is_renumbered_in_official_order(tmp_path):
    for wnid in ("n02099601", "n01443537"):
        write(tmp_path / "train" / wnid / "x.JPEG", size=(8, 8))
        write(tmp_path / "val" / wnid / "y.JPEG", size=(8, 8))
    for split in ("train", "test"):
        images, labels, names = imagenet.load(split, data_dir=tmp_path, size=4)
        assert labels.tolist() == [0, 1] and names == ["goldfish", "golden retriever"]
        assert images[1].shape == (4, 4, 3)


def test_imagenet_refuses_other_layouts(tmp_path):
    refused(lambda: imagenet.load("train", data_dir=None), "--data-dir", "train/<wnid>")
    write(tmp_path / "train" / "cats" / "x.png")
    refused(lambda: imagenet.load("train", data_dir=tmp_path), "'cats'", "n01440764", "--dataset")


def test_find_class():
    find = imagenet.find_class
    assert [find(t) for t in ("tench", "n01440764", "0", " Goldfish ", "dfish", "999")] == [
        0, 0, 0, 1, 1, 999]
    assert [find(name) for name in imagenet.class_names() if name not in ("crane", "maillot")] == [
        k for k, n in enumerate(imagenet.class_names()) if n not in ("crane", "maillot")]
    refused(lambda: find("CARDIGAN"), "Cardigan (264)", "cardigan (474)")
    refused(lambda: find("crane"), "fits 2", "crane (134)", "crane (517)")
    assert refused(lambda: find("terrier"), "terrier").count("(") == 5
    refused(lambda: find("goldfsh"), "none", "goldfish (1)")
    for hopeless in ("", "1000", "-1", "qqqqqq"):
        refused(lambda: find(hopeless), "0..999")


names_of_pictures = st.lists(st.text("abc0123", min_size=1, max_size=6), min_size=2, max_size=45,
                             unique=True)


@given(names=names_of_pictures, extra=st.text("abc0123", min_size=1, max_size=6))
def test_which_side_a_picture_is_on_depends_on_its_name_and_not_on_its_neighbours(names, extra):
    """Every 20th of the sorted names would move most pictures when one is added."""
    before = dict(zip(names, folder.held_out(names)))
    after = dict(zip([extra, *names], folder.held_out([extra, *names])))
    moved = [name for name in names if before[name] != after[name]]
    assert len(moved) <= 1 and 0 < sum(before.values()) < len(names)
    assert dict(zip(names[::-1], folder.held_out(names[::-1]))) == before


def validation_of(root, layout, names=("00000001", "00000002", "00000003"), **changes):
    """ImageNet, two classes, whose validation pictures lie flat. -> {picture: label}"""
    wnids, base = ("n01443537", "n02099601"), root
    for wnid in wnids:
        inside = "images" if layout == "tiny" else ""
        write(root / "train" / wnid / inside / f"{wnid}_0.JPEG", size=(8, 8))
    if layout == "kaggle":
        base = root / "ILSVRC" / "Data" / "CLS-LOC"
        base.mkdir(parents=True)
        (root / "train").rename(base / "train")
    prefix = "val_" if layout == "tiny" else "ILSVRC2012_val_"
    labels = {f"{prefix}{name}": int(name) % 2 for name in names}
    for name in labels:
        write(base / "val" / ("images" if layout == "tiny" else "") / f"{name}.JPEG", size=(8, 8))
    if layout == "kaggle":
        (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(
            f"{name},{wnids[label]} 1 2 3 4 {wnids[label]} 5 6 7 8 \n"
            for name, label in reversed(labels.items())))
    elif layout == "tiny":
        (base / "val" / "val_annotations.txt").write_text("".join(
            f"{name}.JPEG\t{wnids[label]}\t0\t32\t44\t62\n" for name, label in labels.items()))
    elif layout == "devkit":
        devkit = root / "ILSVRC2012_devkit_t12" / "data"
        devkit.mkdir(parents=True)
        (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(
            f"{(450, 125)[label]}\n" for label in labels.values()))
        # As in the kit itself: 450 is the goldfish, 125 the golden retriever.
        wnids = [wnid for wnid, _ in imagenet._table()]
        for number, wnid in ((450, "n01443537"), (125, "n02099601")):
            other = wnids.index(wnid)
            wnids[number - 1], wnids[other] = wnids[other], wnids[number - 1]
        block = zlib.compress(b"".join(b"\x10\0" + wnid.encode() + b"\0\1words" for wnid in wnids))
        (devkit / "meta.mat").write_bytes(b"MATLAB 5.0 MAT-file".ljust(128)
                                          + struct.pack("<II", 15, len(block)) + block)
    return labels


@pytest.mark.parametrize("layout", ["kaggle", "tiny", "devkit"])
def test_flat_validation_pictures_get_their_labels_from_the_list_that_came_with_them(
        tmp_path, layout):
    expected = validation_of(tmp_path, layout)
    images, labels, names = imagenet.load("test", data_dir=tmp_path, size=4)
    assert names == ["goldfish", "golden retriever"]
    assert {Path(images.path(i)).stem: k for i, k in enumerate(labels)} == expected
    assert len(imagenet.load("train", data_dir=tmp_path, size=4)[0]) == 2


def test_validation_pictures_without_labels_or_of_too_few_classes_are_refused(tmp_path):
    validation_of(tmp_path / "no list", "none")
    refused(lambda: imagenet.load("test", data_dir=tmp_path / "no list"), "LOC_val_solution.csv",
            "ILSVRC2012_validation_ground_truth.txt", "val/<wnid>/")
    validation_of(tmp_path / "few", "kaggle", names=["00000001", "00000003"])
    refused(lambda: imagenet.load("test", data_dir=tmp_path / "few"), "1 of the 2 classes",
            "goldfish")
    validation_of(tmp_path / "more", "tiny")
    write(tmp_path / "more" / "val" / "images" / "val_7.JPEG")
    refused(lambda: imagenet.load("test", data_dir=tmp_path / "more"), "val_7", "val_annotations")
    validation_of(tmp_path / "damaged", "devkit")
    (tmp_path / "damaged" / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").write_bytes(b"no" * 99)
    refused(lambda: imagenet.load("test", data_dir=tmp_path / "damaged"), "meta.mat is missing or")
    (tmp_path / "damaged" / "LOC_val_solution.csv").write_bytes(b"\xff\xfe")
    refused(lambda: imagenet.load("test", data_dir=tmp_path / "damaged"), "LOC_val_solution.csv")


def png_that_says(width, height):
    """The first 45 bytes of a picture of any size."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("width, height", [(9500, 9500), (13000, 13000), (10 ** 6, 10 ** 6)])
def test_a_huge_picture_is_skipped_in_one_line_and_counted_over_all_workers(
        tmp_path, capfd, monkeypatch, width, height):
    """Pillow warns in three lines above 89 million pixels, and refuses above 179 million only."""
    if width == 9500:
        monkeypatch.setattr(folder, "MAX_PIXELS", 10 ** 6)
    for n in range(4):
        write(tmp_path / "train" / "a" / f"{n}.png")
        write(tmp_path / "val" / "a" / f"{n}.png")
    (tmp_path / "train" / "a" / "1.png").write_bytes(png_that_says(width, height))
    images = folder.load("train", data_dir=tmp_path, size=8)[0]
    for _ in range(2):
        jobs = iter([[(n, seed)] for seed in (-1, 1, 2) for n in range(4)])
        assert len(list(batches.picture_batches(images, jobs, 2))) == 12
    lines = capfd.readouterr().err.splitlines()
    skipped = [line for line in lines if "1.png" in line]
    assert 1 <= len(skipped) <= 2 and f"more than {folder.MAX_PIXELS:,} pixels" in skipped[0]
    assert images.skipped() == 1
    assert lines.count("1 of 4 images skipped: others of their class stand in for them") == 2


def test_a_data_set_from_outside_is_one_line_in_the_table(monkeypatch):
    def load(split, *, data_dir, size):
        return np.full((3, size, size, 3), len(split), np.uint8), np.arange(3), ["a", "b", "c"]
    refused(lambda: registry.load_data("toy", "train", 16), "'toy'", "shapes, cifar10, imagenet")
    monkeypatch.setitem(registry.DATASETS, "toy", registry.Dataset(load))
    images, labels, names = registry.load_data("toy", "test", 16)
    assert images.shape == (3, 16, 16, 3) and images[0, 0, 0, 0] == 4 and names[2] == "c"
    assert registry.dataset_named("toy").judge_steps == 2000


def test_a_path_is_a_folder_and_every_name_has_its_reader(tmp_path):
    write(tmp_path / "train" / "cat" / "x.png")
    write(tmp_path / "val" / "cat" / "y.png")
    images, labels, names = registry.load_data(str(tmp_path), "test", 16)
    assert images.path(0).endswith("y.png") and images[0].shape == (16, 16, 3) and names == ["cat"]
    assert registry.load_data("shapes", "test", 16)[0].shape == (4000, 16, 16, 3)
    refused(lambda: registry.load_data("imagenet", "train", 64), "--data-dir")
    refused(lambda: registry.load_data("cifar10", "train", 64), "32x32")
