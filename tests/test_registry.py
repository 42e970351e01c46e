"""The table of data sets: classes by name, and some of them alone."""
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_folder import refusal, tree

from data import folder, imagenet, registry

NAMES = ["ant", "Bee", "cat", "dog"]


@pytest.mark.parametrize("wanted, classes", [
    (["cat", "ant"], [0, 2]), (["bee", "Bee"], [1]), (["2"], [0, 1]), (["4"], [0, 1, 2, 3]),
    (["3", "1"], [1, 3])])
def test_classes_are_chosen_by_name_by_index_or_by_how_many(wanted, classes):
    assert registry.chosen_classes(NAMES, wanted) == classes


def test_classes_of_imagenet_have_wnids_too():
    names = imagenet.class_names()
    assert registry.chosen_classes(names, ["n01443537", "tench"]) == [0, 1]
    assert registry.chosen_classes(["goldfish", "volcano"], ["n09472597"]) == [1]


@pytest.mark.parametrize("wanted", [["bird"], ["0"], ["5"], ["n01443537"], ["1", "4"]])
def test_a_class_that_is_not_there_is_refused_and_the_others_are_named(wanted):
    refusal(lambda: registry.chosen_classes(NAMES, wanted), wanted[-1], "4")


def test_find_class():
    names = imagenet.class_names()
    assert [registry.find_class(names, text) for text in (
        "tench", "n01440764", "0", " Goldfish ", "dfish", "999", "Cardigan", "cardigan", "crane",
        "n02012849")] == [0, 0, 0, 1, 1, 999, 264, 474, 517, 134]
    assert registry.find_class(["0", "1", "10", "2"], "2") == 3, "a name comes before an index"
    for k, name in list(enumerate(names))[::9]:
        assert registry.find_class(names, name) == k
    for text, *words in [("CARDIGAN", "Cardigan (264)", "cardigan (474)"),
                         ("cran", "fits 2", "crane bird (134)", "crane (517)"),
                         ("goldfsh", "none", "goldfish (1)"), ("", "tench (0)"), ("1000", "none"),
                         ("-1", "none"), ("qqqqqq", "none of the 1000", "tench (0)")]:
        refusal(lambda: registry.find_class(names, text), *words)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.sets(st.integers(0, 3), min_size=1))
def test_a_subset_holds_the_images_of_its_classes_with_labels_from_0(labels, classes):
    images = np.arange(len(labels) * 3).reshape(-1, 1, 1, 3).astype(np.uint8)
    classes = sorted(classes)
    found, new = registry.subset(images, np.array(labels), classes)
    wanted = [(i, classes.index(label)) for i, label in enumerate(labels) if label in classes]
    assert found[:, 0, 0, 0].tolist() == [3 * i for i, _ in wanted]
    assert new.tolist() == [label for _, label in wanted] and new.dtype == np.int64


def test_a_subset_of_files_reads_its_own_files_and_lets_its_own_stand_in(tmp_path):
    root = tree(tmp_path, train="ant/0.png bee/0.png cat/0.png cat/1.png", val="ant/0.png")
    (root / "train/cat/0.png").write_bytes(b"no image")
    images, labels, names = folder.load("train", data_dir=root, size=2)
    assert names == ["ant", "bee", "cat"]
    images, labels = registry.subset(images, labels, [0, 2])
    assert labels.tolist() == [0, 1, 1] == images.labels.tolist()
    paths = [re.split(r"[/\\]", images.path(i))[-2:] for i in range(3)]
    assert paths == [["ant", "0.png"], ["cat", "0.png"], ["cat", "1.png"]]
    assert images[1].shape == (2, 2, 3) and images.skipped() == 1
