"""Readers, data sets by name, views and batches: what is read, how, and what is refused."""
import hashlib
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from data import batches, cifar10, folder, imagenet, registry, shapes
from engine import BadInput

RGB, WHITE = (200, 100, 50), (255, 255, 255)
WNIDS, CLASSES = ("n01443537", "n02099601"), ["goldfish", "golden retriever"]


def write(path, colour=RGB, size=(2, 2), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def tree(root, names):
    """Write a small PNG to each of these relative paths, whatever their endings. -> root"""
    for name in names.split():
        write(root / name, format="PNG")
    return root


def refusal(call, *words):
    """`call` raises BadInput with one line that holds all these words."""
    with pytest.raises(BadInput) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def found(root, split="train", load=folder.load):
    """-> {image path below root: class name} of one split, class names"""
    images, labels, names = load(split, data_dir=root, size=2)
    paths = [Path(images.path(i)).relative_to(root).as_posix() for i in range(len(images))]
    return {path: names[label] for path, label in zip(paths, labels, strict=True)}, names


def test_the_shapes_have_not_changed_and_depend_on_seed_split_and_index_alone():
    """The shipped checkpoint was trained on exactly these images."""
    images, labels, names = shapes.load("train", count=1_000)
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "fb82b4b4f86d4efb"
    assert labels.dtype == np.int64 and np.bincount(labels).tolist() == [100] * 10
    some, kinds = shapes.draw([907, 3, 13])
    assert (some == images[[907, 3, 13]]).all() and kinds.tolist() == [7, 3, 3]
    for other in (shapes.draw([3], split="test"), shapes.draw([3], seed=1)):
        assert (other[0] != images[3]).any()
    large = shapes.draw(range(10), size=128)[0].reshape(10, 32, 4, 32, 4, 3)
    assert abs(large.mean(axis=(2, 4)) - images[:10]).mean() < 0.5, "the same at another size"
    for split, size in (("valid", 32), ("test", 8), ("test", 512)):
        refusal(lambda: shapes.load(split, size=size), "shapes")


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Both layouts of 6 x 20 random images. -> labels (6, 20), pixels (6, 20, 3072)"""
    monkeypatch.setattr(cifar10, "PER_FILE", 20)
    labels = np.random.default_rng(0).integers(0, 10, (6, 20))
    pixels = np.random.default_rng(1).integers(0, 256, (6, 20, 3072), np.uint8)
    for kind in ("bin", "py"):
        (tmp_path / kind / f"cifar-10-batches-{kind}").mkdir(parents=True)
    for k, name in enumerate(cifar10.FILES["train"] + cifar10.FILES["test"]):
        records = np.concatenate([labels[k, :, None].astype(np.uint8), pixels[k]], 1)
        (tmp_path / f"bin/cifar-10-batches-bin/{name}.bin").write_bytes(records.tobytes())
        batch = {b"data": pixels[k], b"labels": labels[k].tolist(), b"batch_label": b"x"}
        raw = pickle.dumps(batch, 2).replace(b"numpy._core", b"numpy.core")  # as it once was
        (tmp_path / f"py/cifar-10-batches-py/{name}").write_bytes(raw)
    return labels, pixels


def pack(source, archive):
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, source.name)


def test_cifar10_is_the_same_in_both_layouts_unpacked_or_not_and_downloaded(
        cifar, tmp_path, monkeypatch):
    def download(url, path, sha256):
        assert (path.parent.name, url, sha256) == ("empty", cifar10.URL, cifar10.SHA256)
        pack(tmp_path / "bin/cifar-10-batches-bin", path)
    monkeypatch.setattr(cifar10, "download", download)
    pack(tmp_path / "py/cifar-10-batches-py", tmp_path / "packed/cifar-10-python.tar.gz")
    for place in ("bin", "bin/cifar-10-batches-bin", "py", "py/cifar-10-batches-py",
                  "packed", "packed/cifar-10-python.tar.gz", "empty"):
        for split, files in (("train", slice(5)), ("test", slice(5, 6))):
            images, labels, names = cifar10.load(split, data_dir=tmp_path / place, size=32)
            assert (images.dtype, labels.dtype, names[9]) == (np.uint8, np.int64, "truck")
            assert (labels == cifar[0][files].flatten()).all() and images.flags.c_contiguous
            n, y, x, c = np.indices((len(labels), 32, 32, 3))
            records = cifar[1][files].reshape(-1, 3072)
            assert (images == records[n, 1024 * c + 32 * y + x]).all()


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


def test_damaged_and_hostile_files_and_cifar100_are_refused(cifar, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python = Path("py/cifar-10-batches-py/test_batch")
    binary = Path("bin/cifar-10-batches-bin/test_batch.bin")
    whole = binary.read_bytes()
    for path, raw, word in (
            (binary, whole[:-7], "reshape"), (binary, whole[:-3073], "19 images"),
            (binary, b"\x0b" + whole[1:], "up to 11"), (python, b"no pickle", "Unpickling"),
            (python, pickle.dumps({b"data": Hostile(), b"labels": [0]}), "mkdir")):
        path.write_bytes(raw)
        refusal(lambda: cifar10.load("test", data_dir=path.parent), "CIFAR-10", word)
    assert not Path("hostile").exists()
    tree(tmp_path, "cifar-100-python/meta one/cifar-100-python.tar.gz")
    for place in (tmp_path, "cifar-100-python", "one"):
        refusal(lambda: cifar10.load("test", data_dir=place), "holds CIFAR-100")
    pack(tmp_path / "one", tmp_path / "a.tar.gz")
    refusal(lambda: cifar10.load("test", data_dir="a.tar.gz"), "it lacks test_batch")
    refusal(lambda: cifar10.load("test", size=64), "32x32", "64")


def only(path, size=16):
    return folder.load("train", data_dir=path, size=size)[0]


@pytest.mark.parametrize("mode, colour, ending, seen", [
    ("1", 1, "png", WHITE), ("LA", (0, 102), "png", [153] * 3), ("RGB", RGB, "jp2", RGB),
    ("RGBA", (*RGB, 0), "gif", WHITE), ("RGBA", (*RGB, 51), "webp", (244, 224, 214)),
    ("CMYK", (55, 155, 205, 0), "jpg", RGB), ("I;16", 120 * 257, "png", [120] * 3)])
def test_every_mode_is_read_in_its_true_colours(tmp_path, mode, colour, ending, seen):
    Image.new(mode, (20, 16), colour).save(tmp_path / f"a.{ending}", lossless=True)
    pixels = only(tmp_path)[0]
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.reshape(-1, 3), [seen] * 256, atol=3)


@pytest.mark.parametrize("orientation, undo", [(2, 0), (5, 5), (8, 4)])
def test_exif_orientation_puts_the_image_upright(tmp_path, orientation, undo):
    image, exif = Image.new("RGB", (600, 400)), Image.Exif()
    image.paste((250, 0, 0), (0, 0, 300, 200))      # upper left
    image.paste((0, 250, 0), (300, 0, 600, 200))    # upper right
    exif[0x0112] = orientation
    image.transpose(Image.Transpose(undo)).save(tmp_path / "a.jpg", exif=exif)
    seen = only(tmp_path)[0].astype(int)
    assert np.abs(seen[4, [4, -4]] - [(250, 0, 0), (0, 250, 0)]).max() < 12
    assert seen[-4, [4, -4]].max() < 12


@given(size=st.integers(8, 32), width=st.integers(40, 80), height=st.integers(40, 80),
       seed=st.integers(0, 2 ** 63 - 1))
def test_a_crop_is_a_square_of_the_image(tmp_path_factory, size, width, height, seed):
    """Red is 3x and green is 3y, so the pixels of a crop tell where they come from."""
    path = tmp_path_factory.getbasetemp() / "ramp.png"
    y, x = np.mgrid[:height, :width]
    Image.fromarray(np.stack([3 * x, 3 * y, 0 * x], -1).astype(np.uint8)).save(path)
    images = folder.FolderImages(path.parent, [path.name] * 2, [0, 0], size)
    scale = min(width, height) / round(1.125 * size)       # pixels of the file per pixel
    for crop in (images[0], images[0, seed]):
        for along, side in ((crop[size // 2, :, 0], width), (crop[:, 4, 1], height)):
            along = along[2:-2] / 3                 # near a border the filter is lopsided
            assert np.abs(along - along[0] - scale * np.arange(size - 4)).max() < 1
            assert -1 < along[0] + 0.5 - 2.5 * scale < side - size * scale + 1
    middle = images[0].astype(float).mean((0, 1))[:2] / 3
    assert np.abs(middle - [(width - 1) / 2, (height - 1) / 2]).max() < 0.6
    assert (images[0, seed] == images[0, seed]).all()
    assert width == height or (images[0, seed] != images[1, seed]).any()


@pytest.mark.parametrize("shape", [(1, 500), (1, 1), (40000, 3)])
def test_extreme_shapes(tmp_path, shape):
    write(tmp_path / "a.png", size=shape)
    images = only(tmp_path, size=64)
    assert (images[0] == RGB).all() and (images[-1, 1] == RGB).all()
    assert len(list(images)) == 1, "iterating ends by an IndexError"


def test_unreadable_images_are_named_counted_and_replaced_by_others_of_their_class(
        tmp_path, capfd, monkeypatch):
    """A program disguised as a JPEG is not started."""
    for name, grey in (("a/0", 10), ("a/3", 60), ("a/6", 110), ("b/0", 210)):
        write(tmp_path / f"{name}.png", (grey,) * 3)
    write(tmp_path / "a/8.jpg", (30,) * 3, exif=b"Exif\0\0garbage that is no header")
    whole = write(tmp_path / "whole.jpg", size=(200, 200)).read_bytes()
    for name, body in ((1, b""), (2, whole[:len(whole) // 2]), (4, b"no image"),
                       (5, b"P6 1000000 1000000 255\n"), (7, b"%!PS-Adobe-3.0 EPSF-3.0\n")):
        (tmp_path / f"a/{name}.jpg").write_bytes(body)
    started = tmp_path / "started"
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: started.touch())
    write(tmp_path / "a/a.eps").rename(tmp_path / "a/9.jpg")
    images = folder.FolderImages(
        tmp_path, sorted(tmp_path.glob("[ab]/*")), [0] * 10 + [1], 16)
    for workers, bad in ((2, {"1", "2", "4", "5", "7", "9"}), (0, set())):
        jobs = [[(n, seed)] for seed in (-1, 5) for n in range(11)]
        seen = [int(x[0, 0, 0, 0]) for x in batches.picture_batches(images, jobs, workers)]
        expected = [10, 60, 60, 60, 110, 110, 110, 30, 30, 10, 210]    # of a/0 to a/9 and b/0
        assert seen == pytest.approx(2 * expected, abs=2)
        named = re.findall(r"unreadable image no. \d: \S*/a/(.)\.jpg ", capfd.readouterr().err)
        assert set(named) == bad, "no file is tried twice"
        assert images.unreadable.sum() == 6 and not started.exists()
    (tmp_path / "b/0.png").write_bytes(b"")
    refusal(lambda: images.subset([8, 10], [0, 1])[1], "b/0.png", "no image of the class")


def test_classes_own_nested_images_in_natural_order_and_the_rest_is_named_and_counted(
        tmp_path, capsys):
    tree(tmp_path, "10/a.png 2/deep/er/b.PNG 2/c.jpg 0/d.gif cat/._e.png cat/.f/g.png "
                   "x.png __MACOSX/h.png 2/notes.txt 10/i.xyz dog/photos.zip")
    for _ in range(2):
        train, test = (found(tmp_path, split)[0] for split in ("train", "test"))
    assert len(test) == 1 and found(tmp_path)[1] == ["0", "2", "10"]
    assert train | test == {
        "0/d.gif": "0", "2/c.jpg": "2", "2/deep/er/b.PNG": "2", "10/a.png": "10"}
    counted, empty = capsys.readouterr().out.splitlines()
    assert "passed over 4 file(s)" in counted and empty.endswith(": 'cat', 'dog'")
    names = ["ant", *WNIDS, "n10148035"]
    assert sorted(reversed(names), key=folder.natural) == names


def test_layouts(tmp_path):
    for other in ("val", "valid", "test"):
        root = tree(tmp_path / other, f"train/ant/0.png train/bee/1.png {other}/bee/v.png")
        train = {"train/ant/0.png": "ant", "train/bee/1.png": "bee"}
        assert found(tree(root, "docs/x.png")) == (train, ["ant", "bee"])
        assert found(root, "test") == ({f"{other}/bee/v.png": "bee"}, ["ant", "bee"])
    refusal(lambda: found(tree(tmp_path / "val", "val/yak/0.png"), "test"), "'yak'", "train")
    root = tree(tmp_path / "loose", "train/cat/0.png val/0.png")
    refusal(lambda: found(root, "test"), "outside class folders")
    tree(tmp_path, "one/train/cat/0.png one/train/cat/1.png flat/0.png flat/1.png links/a.txt "
                   "two/train/0.png two/train/1.png two/car/0.png two/car/1.png")
    (tmp_path / "links/cat").symlink_to(tmp_path / "flat")
    for name, classes in dict(one=["cat"], flat=["flat"], two=["car", "train"],
                              links=["cat"]).items():      # a class may be called train
        assert found(tmp_path / name, "test")[1] == classes


def test_folders_that_cannot_be_used(tmp_path):
    tree(tmp_path, "single/cat/0.png bad/cat/0.png tars/train/n1.tar file.zip empty/cat/x")
    (tmp_path / "bad/cat/0.png").write_bytes(b"no image")
    for name, split, *words in (
            ("gone", "train", "no images", "gone"), ("empty", "train", "<class>/<image>"),
            ("tars", "train", "unpack", "n1.tar"), ("file.zip", "train", "unpack"),
            ("single", "test", "one image"), ("bad", "train", "no image", "cat/0.png")):
        refusal(lambda: found(tmp_path / name, split), *words)


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_one_image_in_20_is_held_out_on_every_machine_the_same(sizes):
    names = [f"cat/{i}.jpg" for i in range(1000)]
    held = folder.hold_out({"cat": names}, "test")["cat"]
    assert 40 < len(held) < 60 and held[:3] == ["cat/13.jpg", "cat/36.jpg", "cat/38.jpg"]
    classes = {str(k): [f"{k}/{i}.png" for i in range(n)] for k, n in enumerate(sizes)}
    train, test = (folder.hold_out(classes, split) for split in ("train", "test"))
    for name, paths in classes.items():
        assert sorted(train[name] + test[name]) == sorted(paths)
        assert max(sizes) == 1 or train[name] and bool(test[name]) == (len(paths) > 1)
    singles = {name: [f"{name}/0.png"] for name in "abc"}
    assert sum(map(len, folder.hold_out(singles, "test").values())) == 1


def test_imagenet_is_numbered_in_the_official_order_and_looked_for_in_its_folder(
        tmp_path, monkeypatch):
    names = imagenet.class_names()
    wnids = list(imagenet.wnid_names())
    assert len(set(names)) == 1000 and wnids == sorted(wnids)
    assert [names[k] for k in (0, 1, 207, 999)] == ["tench", *CLASSES, "toilet tissue"]
    monkeypatch.setattr(imagenet, "DEFAULT_FOLDER", tmp_path / "imagenet")
    refusal(lambda: imagenet.load("train"), str(tmp_path / "imagenet"), "--data-dir", "<wnid>")
    root = tree(tmp_path / "imagenet", "val/n02099601/y.png val/n01443537/y.png "
                                       "train/n02099601/x.JPEG train/n01443537/x.JPEG")
    for split in ("train", "test"):
        images, labels, names = registry.load_data("imagenet", split, 4)
        assert labels.tolist() == [0, 1] and names == CLASSES
        assert images[1].shape == (4, 4, 3)
    (root / "val/n01443537/y.png").unlink()
    refusal(lambda: found(root, "test", imagenet.load), "goldfish", "test")
    refusal(lambda: found(tree(root, "train/cats/0.png"), "train", imagenet.load), "'cats'")


@pytest.mark.parametrize("inside, listed, row", [
    ("", "../../../LOC_val_solution.csv", "{},{} 1 2 3 4 n01440764 5 6 7 8 \n"),
    ("images/", "val/val_annotations.txt", "{}.JPEG\t{}\t0\t32\t44\t62\n")])
def test_a_list_labels_unsorted_validation_images(tmp_path, inside, listed, row):
    """Of Kaggle, with the images in a folder of its own, and of Tiny-ImageNet."""
    base = tmp_path if inside else tmp_path / "ILSVRC/Data/CLS-LOC"
    tree(base, " ".join(f"train/{wnid}/{inside}0.JPEG" for wnid in WNIDS)
         + "".join(f" val/{inside}v{i}.JPEG" for i in range(3)))
    refusal(lambda: found(tmp_path, "test", imagenet.load), "LOC_val_solution.csv")
    text = "".join(row.format(f"v{i}", WNIDS[i % 2]) for i in (2, 0, 1))
    (base / listed).write_text("ImageId,PredictionString\n" + text)
    images, names = found(tmp_path, "test", imagenet.load)
    assert {Path(name).stem: label for name, label in images.items()} == {
        "v0": CLASSES[0], "v1": CLASSES[1], "v2": CLASSES[0]} and names == CLASSES
    for part, words in (("n01443537", ["n99999999"]), ("v1", ["no label", "v1"])):
        (base / listed).write_text(text.replace(part, "n99999999"))
        refusal(lambda: found(tmp_path, "test", imagenet.load), *words)


def test_classes_are_found_by_name_wnid_index_or_part_of_a_name_and_a_name_wins():
    names = imagenet.class_names()
    for text, k in {"tench": 0, "n01440764": 0, "0": 0, " Goldfish ": 1, "dfish": 1,
                    "999": 999, "Cardigan": 264, "cardigan": 474, "crane": 517}.items():
        assert registry.find_class(names, text) == k
    for text, *words in [("CARDIGAN", "Cardigan", "cardigan"), ("1000", "none"),
                         ("cran", "fits 2", "crane bird"), ("goldfsh", "none", "goldfish"),
                         ("qqqqqq", "none of the 1000", "tench"), ("-1", "none")]:
        refusal(lambda: registry.find_class(names, text), *words)
    names = ["beetle", "Bee", "cat", "7"]
    for wanted, classes in ((["cat", "beetle"], [0, 2]), (["bee", "Bee"], [1]), (["7"], [3]),
                            (["2"], [0, 1]), (["4"], [0, 1, 2, 3]), (["1", "7"], [1, 3])):
        assert registry.chosen_classes(names, wanted) == classes
    for wanted in (["5"], ["0"], ["1", "4"], ["bird"]):
        refusal(lambda: registry.chosen_classes(names, wanted), wanted[-1], "4")


def test_a_data_set_is_one_line_in_the_table_or_a_folder_and_can_be_restricted(
        tmp_path, monkeypatch):
    def load(split, *, data_dir, size):
        images = np.random.default_rng(0).integers(0, 256, (12, size, size, 3), np.uint8)
        return images, np.arange(12) % 3, ["heads", "tails", "edge"]
    monkeypatch.setitem(registry.DATASETS, "coins", registry.Dataset(load))
    splits, chosen, names = registry.load_splits("coins", 8, wanted=["edge", "heads"])
    assert names == ["heads", "edge"] and len(splits["train"][0]) == 12
    for split, (images, labels) in chosen.items():
        assert labels.tolist() == [0, 1] * 4
        assert (images == splits[split][0][[0, 2, 3, 5, 6, 8, 9, 11]]).all()
    tree(tmp_path, "train/ant/0.png train/cat/0.png val/ant/1.png val/cat/1.png train/dog/0.png")
    splits, chosen, names = registry.load_splits(str(tmp_path), 4, wanted=["cat"])
    assert names == ["cat"] and len(splits["test"][0]) == 2
    for split, path in (("train", "train/cat/0.png"), ("test", "val/cat/1.png")):
        images, labels = chosen[split]
        assert labels.tolist() == [0] and Path(images.path(0)) == tmp_path / path
    refusal(lambda: registry.load_splits(str(tmp_path), 4, wanted=["dog"]), "to test", "dog")
    refusal(lambda: registry.load_data("toy", "train", 16), "'toy'", "shapes, cifar10, ")


@given(view=st.integers(0, 5), side=st.sampled_from([8, 16, 40]), part=st.integers(1, 6))
def test_views_of_images_in_memory_are_mirrored_and_shifted_each_by_its_own_pixels(
        view, side, part):
    images = np.random.default_rng(1).integers(0, 256, (6, side, side, 3), np.uint8)
    parts = np.split(np.arange(6), range(part, 6, part))
    seen = torch.cat(list(batches.view_batches(images, view, parts, 0)))
    reach = side // 16
    shifts = np.random.default_rng(view).integers(0, 2 * reach + 1, (6, 2))
    for image, (down, right), one in zip(images, shifts, seen):
        expected = image[:, ::-1] if view % 2 else image
        if view >= 2:
            padded = np.pad(expected, ((reach, reach), (reach, reach), (0, 0)), "reflect")
            expected = padded[down:down + side, right:right + side]
        assert torch.equal(one, torch.tensor(expected.copy()).permute(2, 0, 1) / 127.5 - 1)


def test_views_of_files_are_crops_and_workers_ignore_the_signals_that_stop_a_run(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images = folder.FolderImages(tmp_path, ["a.png"] * 40, [0] * 40, 16)
    for view in (0, 3):
        loading = batches.view_batches(images, view, np.split(np.arange(40), 20), 2)
        seen = [next(loading), next(loading)]       # now both workers have started
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)
        crops = batches.stack([images[i, view - 1] for i in range(40)])
        assert torch.equal(torch.cat([*seen, *loading]), batches.to_float(crops))


@pytest.mark.slow
def test_a_process_that_ends_while_images_are_being_loaded_does_not_wait_for_its_workers():
    """They ignore the SIGTERM with which Python ends them. It prints its own error."""
    code = """
from PIL import Image
from data import batches, folder
images = folder.FolderImages("data", ["none"] * 100, [0] * 100, 8)
loading = batches.picture_batches(images, [[(i, 0)] for i in range(100)], 2)
images.decoded = lambda i: Image.new("RGB", (9, 9))
next(loading)
raise ValueError("a bug")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True,
                          capture_output=True, timeout=60)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "ValueError: a bug"


def test_a_sample_is_not_of_the_first_classes_alone_and_images_have_a_fingerprint():
    rows = batches.rows_of(5000, 2000)
    assert len(set(rows)) == 2000 and 2300 < rows.mean() < 2700 and rows.max() > 4900
    images = np.zeros((30, 4, 4, 3), np.uint8)
    before = batches.image_fingerprint(images)
    images[29, 0, 0, 0] = 1
    assert batches.image_fingerprint(images) != before
