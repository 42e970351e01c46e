"""ImageNet's folders and class names, and the lists that label its validation images."""
import struct
import zlib
from pathlib import Path

import pytest
from test_folder import refusal, tree

from data import imagenet, registry

WNIDS, CLASSES = ("n01443537", "n02099601"), ["goldfish", "golden retriever"]


def test_classes_are_numbered_in_the_official_order_some_of_them_too(tmp_path):
    wnids, names = zip(*imagenet._table())
    assert len(wnids) == 1000 and list(wnids) == sorted(set(wnids))
    assert [names[k] for k in (0, 1, 207, 999)] == ["tench", *CLASSES, "toilet tissue"]
    tree(tmp_path, train="n02099601/x.JPEG n01443537/x.JPEG", val="n02099601/y.png n01443537/y.png")
    for split in ("train", "test"):
        images, labels, names = imagenet.load(split, data_dir=tmp_path, size=4)
        assert labels.tolist() == [0, 1] and names == CLASSES and images[1].shape == (4, 4, 3)


def unsorted(root, layout, names=("00000001", "00000002", "00000003")):
    """ImageNet, two classes, whose validation images are not sorted. -> {image: label}"""
    base = root / "ILSVRC" / "Data" / "CLS-LOC" if layout == "kaggle" else root
    prefix, inside = ("val_", "images/") if layout == "tiny" else ("ILSVRC2012_val_", "")
    labels = {f"{prefix}{name}": int(name) % 2 for name in names}
    tree(base, train=" ".join(f"{wnid}/{inside}0.JPEG" for wnid in WNIDS),
         val=" ".join(f"{inside}{name}.JPEG" for name in labels))
    if layout == "kaggle":
        (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(
            f"{name},{WNIDS[label]} 1 2 3 4 {WNIDS[label]} 5 6 7 8 \n"
            for name, label in reversed(labels.items())))
    elif layout == "tiny":
        (base / "val" / "val_annotations.txt").write_text("".join(
            f"{name}.JPEG\t{WNIDS[label]}\t0\t32\t44\t62\n" for name, label in labels.items()))
    elif layout == "devkit":
        devkit = root / "ILSVRC2012_devkit_t12" / "data"
        devkit.mkdir(parents=True)
        (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(
            f"{(450, 125)[label]}\n" for label in labels.values()))
        wnids = [wnid for wnid, _ in imagenet._table()]
        for number, wnid in ((450, WNIDS[0]), (125, WNIDS[1])):      # as in the kit itself
            other = wnids.index(wnid)
            wnids[number - 1], wnids[other] = wnids[other], wnids[number - 1]
        block = zlib.compress(b"".join(b"\x10\0" + wnid.encode() + b"\0\1words" for wnid in wnids))
        (devkit / "meta.mat").write_bytes(b"MATLAB 5.0 MAT-file".ljust(128)
                                          + struct.pack("<II", 15, len(block)) + block)
    return labels


@pytest.mark.parametrize("layout", ["kaggle", "tiny", "devkit"])
def test_unsorted_validation_images_get_their_labels_from_the_list_beside_them(tmp_path, layout):
    expected = unsorted(tmp_path, layout)
    images, labels, names = imagenet.load("test", data_dir=tmp_path, size=4)
    assert names == CLASSES
    assert {Path(images.path(i)).stem: k for i, k in enumerate(labels)} == expected
    assert sorted(labels) == labels.tolist(), "what stands in for a damaged image relies on it"
    assert len(imagenet.load("train", data_dir=tmp_path, size=4)[0]) == 2


@pytest.mark.parametrize("layout, change, words", [
    ("kaggle", lambda text: text.replace(f"2,{WNIDS[0]}", "2,"), ["no label", "val_00000002"]),
    ("kaggle", lambda text: text.replace(f"2,{WNIDS[0]}", "2,n99999999"),
     ["'n99999999'", "val_00000002"]),
    ("kaggle", lambda text: "ImageId\n", []), ("tiny", lambda text: text[20:], ["no label"]),
    *[("devkit", lambda text, line=line: text.replace("450", line), [f"line 2 is {line!r}"])
      for line in ("", "0", "-3", "1001", "n01440764")]])   # an empty one would shift all others
def test_a_list_of_labels_that_is_wrong_is_refused_with_its_name(tmp_path, layout, change, words):
    unsorted(tmp_path, layout)
    path, = {path for name in imagenet.LISTS for path in tmp_path.rglob(name)}
    path.write_text(change(path.read_text()))
    refusal(lambda: imagenet.load("test", data_dir=tmp_path), path.name, *words)


def test_what_is_not_imagenet_is_refused(tmp_path):
    tree(tmp_path / "cats", train="cats/0.png", val="cats/0.png")
    unsorted(tmp_path / "no list", "none")
    unsorted(tmp_path / "few", "kaggle", names=["00000001", "00000003"])
    unsorted(tmp_path / "meta", "devkit")
    (tmp_path / "meta/ILSVRC2012_devkit_t12/data/meta.mat").write_bytes(b"no" * 99)
    for name, *words in [("cats", "'cats'", "n01440764"), ("few", "1 of the 2", "goldfish"),
                         ("no list", "LOC_val_solution.csv", imagenet.TRUTH, "val/<wnid>/"),
                         ("meta", "meta.mat")]:
        refusal(lambda: imagenet.load("test", data_dir=tmp_path / name), *words)
    refusal(lambda: imagenet.load("train", data_dir=None), "--data-dir")


def test_data_sets_are_found_by_their_name_in_the_table_or_as_a_folder(tmp_path):
    tree(tmp_path, train="cat/x.png", val="cat/y.png")
    images, _, names = registry.load_data(str(tmp_path), "test", 16)
    assert images.path(0).endswith("y.png") and images[0].shape == (16, 16, 3) and names == ["cat"]
    assert registry.load_data("shapes", "test", 16)[0].shape == (4000, 16, 16, 3)
    refusal(lambda: registry.load_data("toy", "train", 16), "'toy'", "shapes, cifar10, imagenet")
