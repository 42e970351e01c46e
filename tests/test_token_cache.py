"""The token cache: the right tokens, made once; stale ones noticed, interrupted ones finished."""
import re
import shutil
import signal
import tracemalloc
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import batches, folder, shapes, views
from engine import token_cache
from engine.processes import Processes
from engine.run_folder import RunFolder
from engine.stop import StopSignal

m2, m5 = import_module("02_multiscale_vqvae"), import_module("05_train")


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A tokenizer and 32 images in memory, encoded 4 at a time. `encoded` counts them; when it has
    reached `limit`, `halt` is called."""
    torch.manual_seed(0)
    tokenizer = m2.MultiScaleVQVAE(m2.TokenizerConfig(
        image_size=16, scales=(1, 2, 4), vocab_size=16, latent_dim=4, channels=8, groups=4))
    processes = Processes("cpu")
    s = SimpleNamespace(settings=SimpleNamespace(dataset="shapes", precision="float32"),
                        processes=processes, folder=RunFolder(tmp_path),
                        stop=StopSignal(processes), views=2,
                        tokenizer=tokenizer.eval().requires_grad_(False),
                        images=shapes.load("train", size=16, count=32)[0], encoded=0, limit=0,
                        path=tmp_path / "tokens_train.npy", make=m2.MultiScaleVQVAE.image_to_tokens)

    def spy(self, image):
        if s.encoded >= s.limit:
            s.halt()
        s.encoded += len(image)
        return s.make(self, image)
    monkeypatch.setattr(m2.MultiScaleVQVAE, "image_to_tokens", spy)
    monkeypatch.setattr(views, "per_pass", lambda side: 4)
    # After three seconds, which a slow machine needs, it would say how far it is.
    monkeypatch.setattr(token_cache, "progress", lambda parts, *_, **__: parts)
    return s


def build(s, limit=10 ** 9):
    s.limit, s.encoded = limit, 0
    return token_cache.cache_tokens(s.settings, s.processes, s.folder, s.stop, s.tokenizer,
                                    views.Views(s.images, s.views), "train")


def interrupt(s, after=20):
    s.halt = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        build(s, after)
    assert s.encoded == after and not s.path.with_suffix(".json").exists()
    assert len(list(s.folder.path.glob("*.tmp"))) == 2


def tokens_of(s, pixels):
    parts = batches.to_float(torch.from_numpy(np.ascontiguousarray(pixels))).split(4)
    return torch.cat([torch.cat(s.make(s.tokenizer, part), 1) for part in parts]).numpy()


def is_right(s, cache):
    """View 0 holds the images' tokens, view 1 those of the mirror images, and nothing is left."""
    assert np.array_equal(cache[0], tokens_of(s, s.images)) and len(cache) == s.views
    assert s.views == 1 or np.array_equal(cache[1], tokens_of(s, s.images[:, :, ::-1]))
    return not list(s.folder.path.glob("*.tmp"))


def test_the_cache_is_mapped_from_the_disk_and_used_again(made, capsys):
    cache = build(made)
    assert cache.shape == (2, 32, 21) and cache.dtype == np.uint16 and is_right(made, cache)
    assert isinstance(again := build(made), np.memmap) and np.array_equal(cache, again)
    assert made.encoded == 0 and capsys.readouterr().out == "" and not cache.flags.writeable


def test_views_of_images_in_memory_are_mirrored_and_shifted_each_by_its_own_pixels():
    """The slow way: all shifts of the image with reflected borders."""
    image, rows = torch.rand(20, 3, 32, 32), np.arange(20)
    for view in range(6):
        shown = views.view_of(image, view, rows, 20)
        parts = [views.view_of(image[part], view, part, 20) for part in np.split(rows, [3, 11])]
        assert torch.equal(shown, torch.cat(parts)), "depends on what is encoded together"
        wide = F.pad(image.flip(3) if view % 2 else image, (2,) * 4, "reflect")
        fits = torch.stack([(wide[:, :, y:y + 32, x:x + 32] == shown).flatten(1).all(1)
                            for y in range(5) for x in range(5)])    # (shifts, images)
        assert fits.any(0).all()
        assert fits[12].all() if view < 2 else fits.any(1).sum() >= 6


def test_image_files_are_decoded_once_for_all_their_crops_and_known_by_their_names(
        made, picture_folder, tmp_path, capsys, monkeypatch):
    def load():
        return folder.load("train", data_dir=tmp_path / "images", size=16)[0]
    one, *_ = sorted(shutil.copytree(picture_folder, tmp_path / "images").glob("bee/*"))
    images = made.images = load()
    made.views, decoded, decode = 3, [], folder.decode
    monkeypatch.setattr(folder, "decode", lambda *args: decoded.append(args) or decode(*args))
    cache, n = build(made), len(images)
    assert len(decoded) == 20 + n, "20 for the fingerprint; each file once for all views"
    cuts = zip(*[images.crops(i, [-1, 0, 1]) for i in range(n)])
    assert np.array_equal(cache, [tokens_of(made, np.stack(view)) for view in cuts])
    assert len({view.tobytes() for view in cache}) == 3 and capsys.readouterr().out == ""
    one.rename(one.with_stem(one.stem + "5")).write_bytes(b"")       # the order stays the same
    made.images = load()
    build(made)
    said = capsys.readouterr()
    assert made.encoded == 3 * n and "pictures changed" in said.out
    assert f"\n1 of {n} images skipped" in said.err


@pytest.mark.parametrize("V, dtype", [(65535, np.uint16), (65536, np.int32)])
def test_what_stands_for_a_missing_token_is_never_a_token(made, V, dtype):
    made.tokenizer = m2.MultiScaleVQVAE(m2.TokenizerConfig(**{
        **vars(made.tokenizer.config), "vocab_size": V}))
    made.make = lambda _, image: [torch.tensor([0, V - 2, V - 1])[
        torch.randint(3, (len(image), n))] for n in (1, 4, 16)]
    interrupt(made)
    cache = build(made)
    assert made.encoded == 44 and cache.dtype == dtype and cache.min() == 0 and cache.max() == V - 1


@pytest.mark.parametrize("what, change", [
    ("tokenizer", lambda s: torch.nn.init.normal_(s.tokenizer.quant_conv.weight)),
    ("pictures", lambda s: vars(s).update(images=s.images[:20])),
    ("dataset, views", lambda s: vars(s).update(views=1, _=vars(s.settings).update(dataset=1))),
    ("pictures", lambda s: np.bitwise_xor.at(s.images, (31, 15, 15, 2), 1))])
@pytest.mark.parametrize("half", [False, True])
def test_a_stale_cache_is_made_again_and_one_line_tells_why(made, what, change, half, capsys):
    interrupt(made) if half else build(made)               # half a cache is just not continued
    change(made)
    assert is_right(made, build(made)) and made.encoded == made.views * len(made.images)
    found = re.findall("tokens of train: (.*) changed since", out := capsys.readouterr().out)
    assert (found, out.count("\n")) == (([], 0) if half else ([what], 1))


@pytest.mark.parametrize("end", ["npy", "json", "npy.tmp", "npy.json.tmp"])
@pytest.mark.parametrize("damage", [
    lambda old: old[:-9], lambda old: old.replace(b"(2,", b"(1,"), lambda old: b"[1]"])
def test_a_damaged_file_of_the_cache_means_that_it_is_made_again(made, end, damage):
    interrupt(made) if end.endswith("tmp") else build(made)
    path = made.folder.path / f"tokens_train.{end}"
    path.write_bytes(damage(old := path.read_bytes()))
    fits = path.read_bytes() == old                        # a note has no shape
    assert is_right(made, build(made)) and (fits or made.encoded == 64)


def test_an_interrupted_cache_is_finished_and_only_what_is_missing_is_encoded(made, capsys):
    build(made)
    whole = made.path.rename(made.path.with_name("whole")).read_bytes()
    interrupt(made, after=20)                              # a crash; then a signal comes
    made.halt = lambda: vars(made.stop).update(number=signal.SIGTERM)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        build(made, limit=20)
    assert re.search("resuming.*same command", capsys.readouterr().out, re.S)
    assert made.encoded == 24, "the four that it was at were to be finished"
    np.load(f"{made.path}.tmp", mmap_mode="r+")[0, 9, 5:] = 65535    # half a row of another four
    made.stop.number = 0
    assert is_right(made, build(made)) and made.encoded == 64 - 20 - 24 + 4
    assert made.path.read_bytes() == whole


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(made):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"tokens_train\.npy.*: File too large"):
            build(made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(made.folder.path.iterdir())


@pytest.mark.parametrize("on_gpu", [False, True])
def test_rows_are_counted_through_all_views_and_keep_their_labels(on_gpu):
    tokens, labels = np.arange(24, dtype=np.int32).reshape(2, 3, 4), np.array([7, 8, 9])
    given = [torch.from_numpy(x) if on_gpu else x for x in (tokens, labels)]
    rows, classes = token_cache.cached_rows(*given, np.array([0, 2, 3, 5]), torch.device("cpu"))
    assert rows.tolist() == [tokens[view, i].tolist() for view in (0, 1) for i in (0, 2)]
    assert classes.tolist() == [7, 9, 7, 9] and rows.dtype == classes.dtype == torch.int64


def test_a_token_cache_that_is_larger_than_the_memory_stays_on_the_disk(tmp_path):
    """68 MB that take no room: a sparse file, whose rows are all zero."""
    np.lib.format.open_memmap(tmp_path / "tokens.npy", "w+", np.uint16, (1, 50_000, 680))
    stage = object.__new__(m5.TransformerStage)
    stage.processes, stage.batch_size, stage.steps = Processes("cpu"), 64, 900
    stage.settings = SimpleNamespace(seed=0)
    stage.data = {"train": (np.load(tmp_path / "tokens.npy", mmap_mode="r"), np.zeros(50_000))}
    tracemalloc.start()
    try:
        assert {len(tokens) for tokens, _ in stage.batches(700)} == {64}
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_two_processes_write_the_cache_that_one_writes(tiny, tmp_path):
    """The one of the training set they only finish, the other is all theirs."""
    run = tmp_path / "two"
    run.mkdir()
    shutil.copy(tiny.folder / "tokenizer.pt", run)
    shutil.copy(tiny.folder / "tokens_train.json", run / "tokens_train.npy.json.tmp")
    half = shutil.copy(tiny.folder / "tokens_train.npy", run / "tokens_train.npy.tmp")
    cache = np.load(half, mmap_mode="r+")
    cache[0, 20:40] = cache[1] = 65535
    process = tiny.start("05_train.py", *tiny.options, "--stage", "transformer", "--steps", 0,
                         "--out", run, "--gpus", 2, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and out.count("resuming where") == 1, err
    for name in ("tokens_train.npy", "tokens_train.json", "tokens_test.npy", "tokens_test.json"):
        assert (run / name).read_bytes() == (tiny.folder / name).read_bytes()
