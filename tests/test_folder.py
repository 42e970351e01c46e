"""Image files: which are read, in which colours, cut where, held out by what; what is refused."""
import pickle
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from data import batches, folder
from engine import BadInput

RGB, GREY, WHITE = (200, 100, 50), (120, 120, 120), (255, 255, 255)


def write(path, colour=RGB, size=(20, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def tree(root, **images):
    """tree(root, train="ant/0.png bee/1.png", val=...): these files, all the same image."""
    for split, names in images.items():
        for name in names.split():
            write(root / split / name, size=(2, 2))
    return root


def refusal(call, *words):
    """`call` raises BadInput, in one line that holds all the words."""
    with pytest.raises(BadInput) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def only(path, size=16):
    """The training images of a folder."""
    return folder.load("train", data_dir=path, size=size)[0]


@pytest.mark.parametrize("mode, colour, ending, seen", [
    ("1", 1, "png", WHITE), ("L", 120, "jpg", GREY), ("LA", (0, 102), "png", (153, 153, 153)),
    ("RGB", RGB, "gif", RGB), ("RGB", RGB, "jp2", RGB), ("RGBA", (*RGB, 0), "gif", WHITE),
    ("RGBA", (*RGB, 51), "webp", (244, 224, 214)), ("CMYK", (55, 155, 205, 0), "jpg", RGB),
    ("YCbCr", (124, 85, 181), "tif", RGB), ("I;16", 120 * 257, "png", GREY),
    ("I", 120 * 257 * 32768, "tif", GREY),
    *[("F", 120 * 257 / top, "tif", GREY) for top in (65535, 257, 1)]])
def test_every_mode_is_read_in_its_true_colours(tmp_path, mode, colour, ending, seen):
    Image.new(mode, (20, 16), colour).save(tmp_path / f"a.{ending}", lossless=True)
    pixels = only(tmp_path)[0]
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable
    np.testing.assert_allclose(pixels.reshape(-1, 3).mean(0), seen, atol=3)
    assert np.ptp(pixels.reshape(-1, 3), axis=0).max() <= 3


@pytest.mark.parametrize("orientation, undo", [(2, 0), (3, 3), (5, 5), (6, 2), (8, 4)])
def test_exif_orientation_puts_the_image_upright(tmp_path, orientation, undo):
    image, exif = Image.new("RGB", (600, 400)), Image.Exif()
    image.paste((250, 0, 0), (0, 0, 300, 200))             # upper left
    image.paste((0, 250, 0), (300, 0, 600, 200))           # upper right
    exif[0x0112] = orientation
    image = image.transpose(Image.Transpose(undo))
    for ending, size in (("jpg", 256), ("tif", 16)):
        (tmp_path / ending).mkdir()
        image.save(tmp_path / ending / f"a.{ending}", exif=exif)
        seen, q = only(tmp_path / ending, size=size)[0].astype(int), size // 4
        assert np.abs(seen[q, [q, -q]] - [(250, 0, 0), (0, 250, 0)]).max() < 12
        assert seen[-q, [q, -q]].max() < 12


@pytest.mark.filterwarnings("error")
def test_unreadable_and_huge_files_are_skipped_named_and_counted(tmp_path, capfd, monkeypatch):
    """Another image of the class stands in. What is disguised as a JPEG starts no interpreter."""
    train = tree(tmp_path, val="a/0.png") / "train" / "a"
    write(train.with_name("b") / "0.png", (210,) * 3)
    for name, grey in ((0, 10), (3, 60), (6, 110)):
        write(train / f"{name}.png", (grey,) * 3)
    write(train / "8.jpg", (30,) * 3, exif=b"Exif\0\0garbage that is no header")
    whole = write(tmp_path / "whole.jpg", size=(200, 200)).read_bytes()
    for name, body in ((1, b""), (2, whole[:len(whole) // 2]), (4, b"P6 13000 13000 255\n"),
                       (5, b"P6 1000000 1000000 255\n"), (7, b"%!PS-Adobe-3.0 EPSF-3.0\n")):
        (train / f"{name}.jpg").write_bytes(body)
    started = tmp_path / "started"
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: started.touch())
    write(train / "a.eps").rename(train / "9.jpg")
    images, labels, _ = folder.load("train", data_dir=tmp_path, size=16)
    assert labels.tolist() == [0] * 10 + [1]
    for workers in (2, 0):     # `bad` is shared: the second time no file is tried again
        jobs = [[(n, seed)] for seed in (-1, 5) for n in range(11)]
        seen = [int(batch[0, 0, 0, 0]) for batch in batches.picture_batches(images, jobs, workers)]
        #                                0   1   2   3   4    5    6    7   8   9   b
        assert seen == pytest.approx(2 * [10, 60, 60, 60, 110, 110, 110, 30, 30, 10, 210], abs=2)
        bad = [Path(images.path(i)).name for i in np.flatnonzero(images.bad)]
        assert bad == [f"{n}.jpg" for n in (1, 2, 4, 5, 7, 9)] and not started.exists()
        told = capfd.readouterr().err                      # here lines of two workers can mingle
        assert told.splitlines()[-1].startswith("6 of 11 images skipped")
        skipped = re.findall("unreadable image .*?([0-9].jpg): ", told)
        assert set(skipped) == set(bad if workers else []) and len(skipped) <= len(bad) * workers


def places(image, size):
    """All crops of the whole image once its short side is 1.125 x size. -> (rows, columns, size,
    size, 3) ints; the one in the middle"""
    scale = round(1.125 * size) / min(image.size)
    sides = [round(side * scale) for side in image.size]
    whole = np.asarray(image.resize(sides, Image.Resampling.LANCZOS)).astype(int)
    crops = np.lib.stride_tricks.sliding_window_view(whole, (size, size, 3))[:, :, 0]
    return crops, crops[crops.shape[0] // 2, crops.shape[1] // 2]


def noise(root, n, size, width=90, height=61):
    """n times one image of noise as the reader sees it, and the image itself."""
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "n.png")
    return folder.FolderImages(root, ["n.png"] * n, [0] * n, size), Image.fromarray(pixels)


@given(seed=st.integers(0, 2 ** 63 - 1), size=st.integers(1, 40), width=st.integers(40, 90),
       height=st.integers(40, 90))
def test_crops_are_those_of_the_whole_resized_image_and_repeat(
        tmp_path_factory, seed, size, width, height):
    images, image = noise(tmp_path_factory.getbasetemp(), 1, size, width, height)
    centre, crop = images.crops(0, [-1, seed])
    assert (crop == pickle.loads(pickle.dumps(images)).crops(0, [seed])).all()
    everywhere, middle = places(image, size)   # the slow way: resize everything, then cut
    assert np.abs(everywhere - crop).max(axis=(2, 3, 4)).min() <= 2
    assert np.abs(middle - centre).max() <= 2


def test_crops_reach_everywhere_and_differ(tmp_path):
    images, _ = noise(tmp_path, 30, 32)
    assert len({crop.tobytes() for crop in images.crops(0, range(400))}) > 70   # of 5 x 22 places
    assert len({images.crops(i, [7]).tobytes() for i in range(30)}) > 15
    assert (images[-1] == images[29]).all() and len(list(images)) == 30, "ends with an IndexError"


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1), (3, 40000)])
def test_extreme_shapes(tmp_path, size):
    write(tmp_path / "a.png", size=size)
    assert (only(tmp_path, size=64).crops(0, [-1, 1]) == RGB).all()


def test_quick_jpeg_decoding_does_not_shift_the_image(tmp_path):
    """At 1/2 to 1/8 scale the last column is partial: 999 pixels become 124.9, not 125."""
    y, x = np.mgrid[:745, :999]
    waves = [np.sin(x / 40) + 0.2 * np.sin(x * y / 999), np.sin(y / 40), x % 9 / 99]
    image = Image.fromarray((127 + 100 * np.stack(waves, -1)).astype(np.uint8))
    image.save(tmp_path / "a.jpg", quality=95)
    for size in (32, 64, 128):
        _, slow = places(Image.open(tmp_path / "a.jpg"), size)
        assert np.abs(only(tmp_path, size=size)[0] - slow).mean() < 0.6


def test_one_image_in_20_is_held_out_on_every_machine_the_same():
    held = folder.held_out(names := [f"cat/{i}.jpg" for i in range(10_000)])
    assert 450 < held.sum() < 550 and np.flatnonzero(held)[:5].tolist() == [13, 36, 38, 53, 70]
    assert not any(folder.held_out([name]) for name in names[:100]), "one alone is trained on"
    mac, linux = ([unicodedata.normalize(form, f"ä\udcff{i}") for i in range(200)]
                  for form in ("NFD", "NFC"))
    assert (folder.held_out(mac) == folder.held_out(linux)).all()
    assert sum(folder.held_out(["ä", "a\u0308"])) == 1


@given(sizes=st.lists(st.integers(1, 25), min_size=1, max_size=4))
def test_the_splits_are_disjoint_and_complete_and_every_class_is_in_both(sizes):
    listed = {f"c{k}": [f"c{k}/{i}.png" for i in range(n)] for k, n in enumerate(sizes)}
    train, test = (folder._split(Path(__file__).parent, split, lambda base: listed)[1]
                   for split in ("train", "test"))
    for name, paths in listed.items():
        assert sorted(train[name] + test[name]) == sorted(paths)
        assert max(sizes) == 1 or train[name] and bool(test[name]) == (len(paths) > 1)
    assert sum(sizes) == 1 or any(test.values())


def test_classes_and_images_have_one_order_however_a_system_writes_their_names(tmp_path):
    """macOS takes an accented letter apart: the two forms of a name sort differently."""
    orders = []
    for form in ("NFC", "NFD"):
        names = [unicodedata.normalize(form, name) for name in ("az", "äpfel", "zoo")]
        tree(tmp_path, **{form: " ".join(f"{c}/{i}.png" for c in names for i in names)})
        classes = folder.classes_in(tmp_path / form)
        assert all((tmp_path / form / path).exists() for group in classes.values()
                   for path in group), "the paths are as they were"
        orders.append([folder.composed(x) for x in (*classes, *sum(classes.values(), []))])
    assert orders[0] == orders[1] and orders[0][:3] == ["az", "zoo", "äpfel"]


@pytest.mark.parametrize("other", ["val", "valid", "test"])
def test_ready_made_splits_are_kept(tmp_path, other, capsys):
    tree(tmp_path, train="äpfel/0.png äpfel/ü.png zebra/1.PNG zebra/2.png zebra/._0.png "
                         "__MACOSX/x.png .hidden/x.png", devkit="notes/x.png",
         **{other: "zebra/v.png"})
    (tmp_path / "train" / "zebra" / "notes.txt").write_text("not even listed")
    images, labels, names = folder.load("train", data_dir=tmp_path, size=2)
    assert names == ["zebra", "äpfel"] and labels.tolist() == [0, 0, 1, 1]
    assert images.path(3).endswith("ü.png") and not images.skipped()
    images, labels, names = folder.load("test", data_dir=tmp_path, size=2)
    assert labels.tolist() == [0] and images.path(0).endswith("v.png") and len(names) == 2
    assert "lacks 1 of the 2 classes of train: äpfel" in capsys.readouterr().err
    tree(tmp_path, **{other: "yak/v.png"})
    refusal(lambda: folder.load("test", data_dir=tmp_path), "'yak'", "train")
    (tmp_path / other / "yak" / "v.png").unlink()
    (tmp_path / other / "zebra" / "v.png").rename(tmp_path / other / "v.png")
    refusal(lambda: folder.load("test", data_dir=tmp_path), "outside class folders", other)


def test_other_layouts(tmp_path):
    tree(tmp_path, one="train/cat/0.png train/cat/1.png", flat="0.png 1.png", far="0.png 1.png",
         two="train/0.png train/1.png car/0.png car/1.png loose.png")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "cat").symlink_to(tmp_path / "far")
    (tmp_path / "links" / "dog").symlink_to(tmp_path / "gone")
    for name, classes in dict(one=["cat"], two=["car", "train"],    # a class may be called train
                              flat=["flat"], links=["cat"]).items():
        assert folder.load("test", data_dir=tmp_path / name, size=2)[2] == classes


@pytest.mark.parametrize("split, place, word", [
    ("train", None, "--data-dir"), ("train", "gone", "gone"), ("train", "bad/cat/0.png", "0.png"),
    ("train", "empty", "no images"), ("train", "loop", "loop.png"), ("dev", ".", "dev"),
    ("test", "single", "one image"), ("train", "bad", "none of the 1 images")])
def test_folders_that_cannot_be_used(tmp_path, split, place, word):
    tree(tmp_path, single="cat/0.png", bad="cat/0.png", loop="cat/0.png")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "bad" / "cat" / "0.png").write_bytes(b"no image")
    (tmp_path / "loop" / "loop.png").symlink_to("loop.png")
    refusal(lambda: folder.load(split, data_dir=place and tmp_path / place), word)
