"""Image files: which are read, in which colours, cut where, held out by what; what is refused."""
import pickle
import struct
import zlib
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
    """The reader's view of a folder that holds one readable image."""
    return folder.load("train", data_dir=path, size=size)[0]


DEEP = np.full((16, 20), 120 * 257)


def flat(mode, colour, ending, seen, **info):
    image = Image.new(mode, (20, 16), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, *RGB])
        image.info.update(info)
    return image, ending, seen


@pytest.mark.parametrize("image, ending, seen", [
    flat("1", 1, "png", WHITE), flat("L", 120, "jpg", GREY),
    flat("LA", (0, 102), "png", (153, 153, 153)),
    flat("P", 1, "png", RGB), flat("P", 1, "png", WHITE, transparency=1),
    flat("P", 1, "gif", WHITE, transparency=1), flat("RGB", RGB, "jp2", RGB),
    flat("RGBA", (*RGB, 51), "webp", (244, 224, 214)), flat("CMYK", (55, 155, 205, 0), "jpg", RGB),
    flat("CMYK", (55, 155, 205, 0), "tif", RGB), flat("YCbCr", (124, 85, 181), "tif", RGB),
    *[(Image.fromarray(levels), ending, GREY) for levels, ending in [
        (DEEP.astype(np.uint16), "png"), (DEEP.astype(np.uint16), "tiff"),
        (DEEP.astype(np.int32), "pgm"), ((DEEP * 32768).astype(np.int32), "tif"),
        *[((DEEP / top).astype(np.float32), "tif") for top in (65535, 257, 1)]]]])
def test_every_mode_is_read_in_its_true_colours(tmp_path, image, ending, seen):
    image.save(tmp_path / f"a.{ending}", lossless=True)
    pixels = only(tmp_path)[0]
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable
    np.testing.assert_allclose(pixels.reshape(-1, 3).mean(0), seen, atol=3)
    assert np.ptp(pixels.reshape(-1, 3), axis=0).max() <= 3


@pytest.mark.parametrize("orientation, undo", [(1, None), (2, 0), (3, 3), (5, 5), (6, 2), (8, 4)])
@pytest.mark.parametrize("ending, size", [("jpg", 256), ("tif", 16)])
def test_exif_orientation_puts_the_image_upright(tmp_path, orientation, undo, ending, size):
    image = Image.new("RGB", (600, 400))
    image.paste((250, 0, 0), (0, 0, 300, 200))             # upper left
    image.paste((0, 250, 0), (300, 0, 600, 200))           # upper right
    exif = Image.Exif()
    exif[0x0112] = orientation
    (image if undo is None else image.transpose(Image.Transpose(undo))).save(
        tmp_path / f"a.{ending}", exif=exif)
    seen, q = only(tmp_path, size=size)[0].astype(int), size // 4
    assert np.abs(seen[q, q] - (250, 0, 0)).max() < 12 > seen[-q, [q, -q]].max()
    assert np.abs(seen[q, -q] - (0, 250, 0)).max() < 12


def test_unreadable_files_are_skipped_and_named_once(tmp_path, capsys, monkeypatch):
    train = tree(tmp_path, val="a/0.png") / "train" / "a"
    write(train.with_name("b") / "0.png", (210,) * 3)
    for name, grey in ((0, 10), (3, 60), (6, 110)):
        write(train / f"{name}.png", (grey,) * 3)
    write(train / "8.jpg", (30,) * 3, exif=b"Exif\0\0garbage that is no header")
    whole = write(tmp_path / "whole.jpg", size=(200, 200)).read_bytes()
    for name, body in ((1, b""), (2, whole[:len(whole) // 2]), (4, b"<html>not found</html>"),
                       (7, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")):
        (train / f"{name}.jpg").write_bytes(body)
    (train / "notes.txt").write_text("not even listed")
    started = []                                           # disguised, it starts no interpreter
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: started.append(args))
    write(train / "a.eps").rename(train / "9.jpg")
    images, labels, names = folder.load("train", data_dir=tmp_path, size=16)
    assert names == ["a", "b"] and labels.tolist() == [0] * 9 + [1]
    #       0   1   2   3   4    6    7   8   9   b
    seen = [10, 60, 60, 60, 110, 110, 30, 30, 10, 210]
    for seed in (-1, 5):
        assert [int(images.crops(i, [seed])[0, 0, 0, 0]) for i in range(10)] == pytest.approx(
            seen, abs=2)
    bad = [Path(images.path(i)).name for i in np.flatnonzero(images.bad)]
    assert bad == ["1.jpg", "2.jpg", "4.jpg", "7.jpg", "9.jpg"] and not started
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0][-5:] for line in lines] == bad


def png_that_says(width, height):
    """The first 45 bytes of an image of any size."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [9500, 13000, 10 ** 6])
def test_a_huge_image_is_skipped_in_one_line_and_counted_over_all_workers(
        tmp_path, capfd, monkeypatch, side):
    """Pillow warns in three lines above 89 million pixels, and refuses above 179 million only."""
    if side == 9500:
        monkeypatch.setattr(folder, "MAX_PIXELS", 10 ** 6)
    tree(tmp_path, train="a/0.png a/2.png a/3.png", val="a/0.png")
    (tmp_path / "train" / "a" / "1.png").write_bytes(png_that_says(side, side))
    images = folder.load("train", data_dir=tmp_path, size=8)[0]
    jobs = [[(n, seed)] for seed in (-1, 1, 2) for n in range(4)]
    assert len(list(batches.picture_batches(images, jobs, 2))) == 12 and images.skipped() == 1
    *skipped, counted = capfd.readouterr().err.splitlines()
    assert 1 <= len(skipped) <= 2, "one a worker at most"
    assert f"1.png: it has more than {folder.MAX_PIXELS:,} pixels" in skipped[0]
    assert counted == "1 of 4 images skipped: others of their class stand in for them"


def resized(image, size):
    """The whole image with its short side brought to 1.125 x size, as ints (H, W, 3)."""
    scale = round(1.125 * size) / min(image.size)
    sides = [round(side * scale) for side in image.size]
    return np.asarray(image.resize(sides, Image.Resampling.LANCZOS)).astype(int)


def middle(pixels, size):
    top, left = (pixels.shape[0] - size + 1) // 2, (pixels.shape[1] - size + 1) // 2
    return pixels[top:top + size, left:left + size]


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """One 90 x 61 image of noise, as the reader sees it at 32 pixels, and as it is."""
    path = tmp_path_factory.mktemp("noise") / "n.png"
    image = np.random.default_rng(1).integers(0, 256, (61, 90, 3), dtype=np.uint8)
    Image.fromarray(image).save(path)
    return only(path.parent, size=32), Image.fromarray(image)


@given(seed=st.integers(0, 2 ** 63 - 1), size=st.integers(1, 40))
def test_crops_are_those_of_the_whole_resized_image_and_repeat(noise, seed, size):
    images = folder.FolderImages(noise[0].root, ["n.png"], [0], size)
    centre, crop = images.crops(0, [-1, seed])
    assert (crop == pickle.loads(pickle.dumps(images)).crops(0, [seed])).all()
    whole = resized(noise[1], size)
    places = np.lib.stride_tricks.sliding_window_view(whole, (size, size, 3))[:, :, 0]
    apart = np.abs(places - crop).max(axis=(2, 3, 4))
    assert apart.min() <= 2   # the slow way: resize everything, then cut
    assert np.abs(middle(whole, size) - centre).max() <= 2


def test_crops_reach_everywhere_and_differ(noise):
    images = noise[0]
    assert len({crop.tobytes() for crop in images.crops(0, range(400))}) > 70   # of 5 x 22 places
    same = folder.FolderImages(images.root, ["n.png"] * 30, [0] * 30, 32)
    assert len({same.crops(i, [7]).tobytes() for i in range(30)}) > 15
    assert (same[-1] == same[29]).all() and len(list(same)) == 30, "ends with an IndexError"


@pytest.mark.parametrize("w, h", [(1, 500), (500, 1), (1, 1), (3, 40000)])
def test_extreme_shapes(tmp_path, w, h):
    write(tmp_path / "a.png", size=(w, h))
    assert (only(tmp_path, size=64).crops(0, [-1, 1]) == RGB).all()


def test_quick_jpeg_decoding_does_not_shift_the_image(tmp_path):
    """At 1/2 to 1/8 scale the last column is partial: 999 pixels become 124.9, not 125."""
    y, x = np.mgrid[:745, :999]
    waves = [np.sin(x / 40) + 0.2 * np.sin(x * y / 999), np.sin(y / 40), x % 9 / 99]
    image = Image.fromarray((127 + 100 * np.stack(waves, -1)).astype(np.uint8))
    image.save(tmp_path / "a.jpg", quality=95)
    for size in (32, 64, 128):
        slow = middle(resized(Image.open(tmp_path / "a.jpg"), size), size)
        assert np.abs(only(tmp_path, size=size)[0] - slow).mean() < 0.6


# -- Which images belong to which split and class --------------------------------------------------

NAMES = st.text("abc0123", min_size=1, max_size=6)


@given(names=st.lists(NAMES, min_size=2, max_size=45, unique=True), extra=NAMES)
def test_which_side_an_image_is_on_depends_on_its_name_and_not_on_its_neighbours(names, extra):
    """Every 20th of the sorted names would move most images when one is added."""
    before = dict(zip(names, folder.held_out(names)))
    after = dict(zip([extra, *names], folder.held_out([extra, *names])))
    assert sum(before[name] != after[name] for name in names) <= 1
    assert 0 < sum(before.values()) < len(names)
    assert dict(zip(names[::-1], folder.held_out(names[::-1]))) == before


def test_one_image_in_20_is_held_out_on_every_machine_the_same(monkeypatch):
    held = folder.held_out([f"cat/{i}.jpg" for i in range(10_000)])
    assert 450 < held.sum() < 550 and np.flatnonzero(held)[:5].tolist() == [13, 36, 38, 53, 70]
    monkeypatch.setattr(folder, "HELD_OUT", 1)
    assert folder.held_out(["a", "b", "c"]).sum() == 2, "never all"


@given(sizes=st.lists(st.integers(1, 25), min_size=1, max_size=4))
def test_the_splits_are_disjoint_and_complete_and_every_class_is_in_both(sizes):
    listed = {f"c{k}": [f"c{k}/{i}.png" for i in range(n)] for k, n in enumerate(sizes)}
    train, test = (folder._split(Path(__file__).parent, split, lambda base: listed)[1]
                   for split in ("train", "test"))
    for name, paths in listed.items():
        assert sorted(train[name] + test[name]) == sorted(paths)
        assert max(sizes) == 1 or len(paths) == 1 or (train[name] and test[name])
    assert sum(sizes) == 1 or any(test.values())


@pytest.mark.parametrize("other", ["val", "valid", "test"])
def test_ready_made_splits_are_kept(tmp_path, other, capsys):
    tree(tmp_path, train="äpfel/0.png äpfel/ü.png zebra/1.PNG zebra/2.png zebra/._0.png "
                         "__MACOSX/x.png .hidden/x.png", devkit="notes/x.png",
         **{other: "zebra/v.png"})
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


def test_other_layouts(tmp_path, capsys):
    def names(name):
        return folder.load("test", data_dir=tmp_path / name, size=2)[2]
    assert names(tree(tmp_path, one="train/cat/0.png train/cat/1.png") / "one") == ["cat"]
    tree(tmp_path, two="train/0.png train/1.png car/0.png car/1.png loose.png")
    assert names("two") == ["car", "train"], "a class may be called train"
    assert "ignored images outside the folders" in capsys.readouterr().err
    tree(tmp_path, flat="0.png 1.png", far="0.png 1.png")
    assert names("flat") == ["flat"]
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "cat").symlink_to(tmp_path / "far")
    (tmp_path / "links" / "dog").symlink_to(tmp_path / "gone")
    assert names("links") == ["cat"]


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    file = tree(tmp_path, single="cat/0.png") / "single" / "cat" / "0.png"
    refusal(lambda: folder.load("train", data_dir=None), "--data-dir")
    refusal(lambda: folder.load("train", data_dir=tmp_path / "gone"), "gone", "No such")
    refusal(lambda: folder.load("train", data_dir=file), "Not a directory")
    refusal(lambda: folder.load("train", data_dir=tmp_path / "empty"), "no images", "<class>")
    refusal(lambda: folder.load("test", data_dir=tmp_path / "single"), "one image")
    refusal(lambda: folder.load("dev", data_dir=tmp_path), "'dev'")
    file.write_bytes(b"no image")
    refusal(lambda: folder.load("train", data_dir=tmp_path / "single"), "none of the 1 images")


def test_names_are_one_block_of_bytes():
    """Lists of strings would slowly be copied by every loading worker: hundreds of megabytes for
    ImageNet."""
    paths = [f"n{i // 13:08d}/ü_{i}.JPEG" for i in range(1000)]
    images = folder.FolderImages("/imagenet", paths, [i // 13 for i in range(1000)], 256)
    assert isinstance(images.names, bytes) and len(pickle.dumps(images)) < 50_000
    assert [images.path(i) for i in range(1000)] == [f"/imagenet/{path}" for path in paths]
