"""The data sets, their names, views and batches: what is read, how, and what is refused."""
import hashlib
import os
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, start
from hypothesis import given, strategies as st
from PIL import EpsImagePlugin, Image

from data import batches, cifar10, folder, imagenet, registry, shapes
from engine import BadInput

RGB = (200, 100, 50)
WNIDS, CLASSES = ("n01443537", "n02099601"), ["goldfish", "golden retriever"]


def tree(root, names):
    """Write a small PNG to each of these relative paths, whatever their endings. -> root"""
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), RGB).save(root / name, format="PNG")
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
    paths = [images.path(i).relative_to(root).as_posix() for i in range(len(images))]
    return {path: names[label] for path, label in zip(paths, labels, strict=True)}, names


def test_shapes_have_not_changed_and_depend_on_seed_split_and_index_alone():
    """The shipped checkpoint was trained on exactly these images."""
    images, _ = shapes.draw(range(1_000))
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "fb82b4b4f86d4efb"
    some, labels = shapes.draw([907, 3, 13])
    assert (some == images[[907, 3, 13]]).all() and labels.tolist() == [7, 3, 3]
    for other in (shapes.draw([3], split="test"), shapes.draw([3], seed=1)):
        assert (other[0] != images[3]).any()


def test_cifar10_is_alike_in_both_layouts_and_when_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "PER_FILE", 4)
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 32, 32, 3), np.uint8)
    labels = images[:, :, 0, 0, 0] % 10
    planes = images.transpose(0, 1, 4, 2, 3).reshape(6, 4, 3072)
    binary, python = tmp_path / "cifar-10-batches-bin", tmp_path / "py/cifar-10-batches-py"
    binary.mkdir()
    python.mkdir(parents=True)
    for i, name in enumerate(cifar10.FILES["train"] + cifar10.FILES["test"]):
        records = np.concatenate([labels[i, :, None], planes[i]], 1)
        (binary / f"{name}.bin").write_bytes(records.tobytes())
        raw = pickle.dumps({b"labels": labels[i].tolist(), b"data": planes[i]}, 2)
        (python / name).write_bytes(raw.replace(b"numpy._core", b"numpy.core"))   # numpy 1

    def download(url, path, sha256):
        assert (url, sha256) == (cifar10.URL, cifar10.SHA256)
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w:gz") as tar:
            tar.add(binary, binary.name)
        return path

    monkeypatch.setattr(cifar10, "download", download)
    for place in (tmp_path, tmp_path / "py", tmp_path / "empty"):
        for split, files in (("train", slice(5)), ("test", slice(5, 6))):
            seen, kinds, names = cifar10.load(split, data_dir=place)
            assert (seen == images[files].reshape(-1, 32, 32, 3)).all()
            assert (kinds == labels[files].flatten()).all() and names[9] == "truck"


def test_damaged_and_hostile_files_are_refused(tmp_path, monkeypatch):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, ("hostile",)

    monkeypatch.chdir(tmp_path)
    tarfile.open("empty.tar.gz", "w:gz").close()
    refusal(lambda: cifar10.load("test", data_dir="empty.tar.gz"), "lacks test_batch")
    Path("test_batch").write_bytes(pickle.dumps({b"data": Hostile(), b"labels": [0]}))
    refusal(lambda: cifar10.load("test", data_dir="."), "cannot read CIFAR-10", "mkdir")
    assert not Path("hostile").exists()


def test_transparency_16_bits_and_orientation_are_understood(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGBA", (20, 16), (*RGB, 51)).save(path)
    assert folder.decode(path).getpixel((9, 9)) == (244, 224, 214)
    Image.new("I;16", (20, 16), 120 * 257).save(path)
    assert folder.decode(path).getpixel((9, 9)) == (120, 120, 120)
    sideways, exif = Image.new("RGB", (96, 64)), Image.Exif()
    exif[0x0112] = 8
    sideways.save(path, exif=exif)
    assert folder.decode(path).size == (64, 96)


def test_unreadable_images_are_named_and_replaced(tmp_path, capfd, monkeypatch):
    names = ["0.png", "1.jpg", "2.png", "3.jpg", "4.png"]
    for name, grey in zip(names, (10, 0, 60, 0, 210)):
        Image.new("L", (2, 2), grey).save(tmp_path / name)
    (tmp_path / "1.jpg").write_bytes(b"no image")
    Image.new("L", (2, 2)).save(tmp_path / "3.jpg", format="EPS")  # a program in disguise
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("started"))
    images = folder.FolderImages(tmp_path, names, [0, 0, 0, 0, 1], 16)
    jobs = [[(n, -1)] for n in (0, 1, 2, 3, 4, 1, 3)]
    for workers, bad in ((1, ["1", "3"]), (0, [])):        # processes share what they found
        seen = [int(x[0, 0, 0, 0]) for x in batches.picture_batches(images, jobs, workers)]
        assert seen == [10, 60, 60, 10, 210, 60, 10]
        assert re.findall(r"unreadable .*/(.)\.jpg", capfd.readouterr().err) == bad
    (tmp_path / "4.png").write_bytes(b"")
    refusal(lambda: images.subset([4], [0])[0], "4.png", "no image of the class")


def test_classes_own_nested_images_in_natural_order_and_the_rest_is_named(tmp_path, capsys):
    tree(tmp_path, "10/a.png 2/deep/er/b.PNG 2/c.jpg 0/d.gif cat/._e.png cat/.f/g.png "
                   "x.png 2/notes.txt 10/i.xyz dog/photos.zip")
    train, names = found(tmp_path)
    test = found(tmp_path, "test")[0]
    assert len(test) == 1 and names == ["0", "2", "10"]
    assert train | test == {
        "0/d.gif": "0", "2/c.jpg": "2", "2/deep/er/b.PNG": "2", "10/a.png": "10"}
    counted, empty = capsys.readouterr().out.splitlines()
    assert "passed over 4 file(s)" in counted and empty.endswith(": cat, dog")


def test_train_and_val_stay_as_they_are_and_other_layouts_are_found_or_refused(tmp_path):
    root = tree(tmp_path / "all", "train/ant/0.png train/bee/1.png val/bee/v.png doc/x.png")
    assert found(root)[0] == {"train/ant/0.png": "ant", "train/bee/1.png": "bee"}
    assert found(root, "test") == ({"val/bee/v.png": "bee"}, ["ant", "bee"])
    refusal(lambda: found(tree(root, "val/yak/0.png"), "test"), "'yak'", "train")
    tree(tmp_path, "one/train/cat/0.png one/train/cat/1.png one/labels/x.txt flat/0.png "
                   "flat/1.png links/a rail/train/0.png rail/bus/0.png tars/train/n1.tar "
                   "tars/val/x")
    (tmp_path / "links/cat").symlink_to(tmp_path / "flat")
    for name, classes in (("one", ["cat"]), ("flat", ["flat"]), ("links", ["cat"]),
                          ("rail", ["bus", "train"])):
        assert found(tmp_path / name)[1] == classes
    refusal(lambda: found(tmp_path / "tars"), "unpack", "n1.tar", "<class>/<image>")


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_one_image_in_20_is_held_out_and_stays_so_when_images_are_added(sizes):
    names = [f"cat/{i}.jpg" for i in range(1000)]
    held = folder.hold_out({"cat": names}, "test")["cat"]
    assert 40 < len(held) < 60
    assert folder.hold_out({"cat": names[:37]}, "test")["cat"] == held[:2]
    classes = {str(k): [f"{k}/{i}.png" for i in range(n)] for k, n in enumerate(sizes)}
    train, test = (folder.hold_out(classes, split) for split in ("train", "test"))
    for name, paths in classes.items():
        assert sorted(train[name] + test[name]) == sorted(paths)
        if max(sizes) > 1:                   # otherwise one class gives its only image
            assert train[name] and bool(test[name]) == (len(paths) > 1)
    assert any(test.values()) == (sum(sizes) > 1) and any(train.values())


def test_imagenet_has_its_official_order(tmp_path):
    names = [*imagenet.wnid_names().values()]
    assert len(set(names)) == 1000 and [names[1], names[207]] == CLASSES
    tree(tmp_path, "train/n02099601/0.JPEG train/n01443537/0.JPEG val/n01443537/1.JPEG")
    assert found(tmp_path, "test", imagenet.load)[1] == CLASSES
    tree(tmp_path, "train/cats/0.png")
    refusal(lambda: found(tmp_path, "train", imagenet.load), "'cats'")


@pytest.mark.parametrize("inside, listed, row", [
    ("", "../../../LOC_val_solution.csv", "{},{} 1 2 3 4 n01440764 5 6 7 8 \n"),
    ("images/", "val/val_annotations.txt", "{}.JPEG\t{}\t0\t32\t44\t62\n")])
def test_kaggle_and_tiny_imagenet_list_their_labels(tmp_path, inside, listed, row):
    base = tmp_path if inside else tmp_path / "ILSVRC/Data/CLS-LOC"
    for i, wnid in enumerate(WNIDS):
        tree(base, f"train/{wnid}/{inside}0.JPEG val/{inside}v{i}.JPEG")
    refusal(lambda: found(tmp_path, "test", imagenet.load), "sort its images", str(base))
    rows = [row.format(f"v{i}", wnid) for i, wnid in enumerate(WNIDS)]
    (base / listed).write_text("ImageId,PredictionString\n" + "".join(rows))
    images, names = found(tmp_path, "test", imagenet.load)
    assert list(images.values()) == names == CLASSES and "v0.JPEG" in list(images)[0]


def test_classes_are_found_by_name_wnid_index_or_part_and_a_name_wins():
    names = [*imagenet.wnid_names().values()]
    for text, k in (("n01440764", 0), (" Goldfish ", 1), ("dfish", 1), ("999", 999),
                    ("Cardigan", 264), ("cardigan", 474)):
        assert registry.find_class(names, text) == k
    refusal(lambda: registry.find_class(names, "cran"), "fits 2", "crane bird")
    names = ["beetle", "bee", "cat", "7", "n01440764"]     # a folder may be named by a wnid
    for wanted, classes in ((["cat", "beetle"], [0, 2]), (["7"], [3]), (["2"], [0, 1]),
                            (["n01440764"], [4])):
        assert registry.chosen_classes(names, wanted) == classes
    refusal(lambda: registry.chosen_classes(names, ["6"]), "6", "5 classes")


def test_a_data_set_can_be_restricted_to_classes_that_have_held_out_images(tmp_path):
    images, labels = registry.subset(np.arange(6), np.array([3, 0, 2, 0, 1, 3]), [0, 3])
    assert images.tolist() == [0, 1, 3, 5] and labels.tolist() == [1, 0, 0, 1]
    tree(tmp_path, "ant/0.png ant/1.png cat/0.png cat/1.png dog/0.png")
    _, chosen, names = registry.load_splits(str(tmp_path), 4, wanted=["cat"])
    images, labels = chosen["test"]
    assert names == ["cat"] and labels.tolist() == [0]
    assert images.path(0).parent == tmp_path / "cat"
    refusal(lambda: registry.load_splits(str(tmp_path), 4, wanted=["dog"]), "held-out")


@given(view=st.integers(0, 5), side=st.sampled_from([8, 16, 40]), part=st.integers(1, 6))
def test_views_of_images_in_memory_equal_a_slow_loop(view, side, part):
    images = np.random.default_rng(1).integers(0, 256, (6, side, side, 3), np.uint8)
    rows_list = np.split(np.arange(6), range(part, 6, part))
    seen = torch.cat(list(batches.view_batches(images, view, rows_list, 0)))
    reach = side // 16
    shifts = np.random.default_rng(view).integers(0, 2 * reach + 1, (6, 2))
    for image, (down, right), one in zip(images, shifts, seen):
        expected = image[:, ::-1] if view % 2 else image
        if view >= 2:
            padded = np.pad(expected, ((reach, reach), (reach, reach), (0, 0)), "reflect")
            expected = padded[down:down + side, right:right + side]
        assert torch.equal(one, torch.tensor(expected.copy()).permute(2, 0, 1) / 127.5 - 1)


def test_views_of_files_are_crops(tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (36, 60, 3), np.uint8)
    image = Image.fromarray(noise)
    image.save(tmp_path / "a.png")
    images = folder.FolderImages(tmp_path, ["a.png"] * 40, [0] * 40, 16)
    centre = image.resize((16, 16), Image.Resampling.LANCZOS, box=(14, 2, 46, 34))
    assert (images[0] == np.asarray(centre)).all()         # 16 of 18 pixels
    crops = np.stack([images[i, 0] for i in range(40)])    # view 1 has the seed 0
    assert len(np.unique(crops, axis=0)) == 40
    seen = list(batches.view_batches(images, 1, np.split(np.arange(40), 20), 2))
    assert torch.equal(torch.cat(seen), batches.to_float(torch.tensor(crops)))


@pytest.mark.slow
def test_a_process_that_fails_does_not_wait_for_its_workers(tmp_path):
    code = f"""
from data import batches, folder
images = folder.FolderImages({str(tree(tmp_path, "0.png"))!r}, ["0.png"] * 99, [0] * 99, 8)
loading = batches.picture_batches(images, [[(i, 0)] for i in range(99)], 2)
next(loading)
raise ValueError("a bug")"""
    done = start("-c", code, cwd=ROOT)
    assert done.communicate(timeout=60)[1].endswith("\nValueError: a bug\n")
