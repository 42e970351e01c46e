"""The token cache: the right tokens, made once; stale ones noticed, interrupted ones finished."""
import errno
import io
import os
import re
import shutil
import signal
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import batches, folder, shapes, views
from engine import token_cache
from engine.processes import Processes
from engine.run_folder import RunFolder
from engine.stop import StopSignal

m2 = import_module("02_multiscale_vqvae")


@pytest.fixture
def studio(tmp_path, monkeypatch):
    """A run, a tokenizer and 32 pictures in memory, encoded 4 at a time. `encoded` counts them;
    when it has reached `limit`, `halt` is called."""
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
    assert np.array_equal(cache[0], tokens_of(s, s.images)) and len(cache) == s.views
    assert s.views == 1 or np.array_equal(cache[1], tokens_of(s, s.images[:, :, ::-1]))
    return not list(s.folder.path.glob("*.tmp"))


def test_the_cache_holds_the_tokens_of_pictures_and_mirror_images_and_is_used_again(studio, capsys):
    cache = build(studio)
    assert cache.shape == (2, 32, 21) and cache.dtype == np.uint16 and cache.max() < 16
    assert is_right(studio, cache) and not np.array_equal(cache[0], cache[1])
    assert isinstance(cache, np.memmap) and not cache.flags.writeable, "never loaded whole"
    assert isinstance(again := build(studio), np.memmap) and np.array_equal(cache, again)
    assert studio.encoded == 0 and capsys.readouterr().out == ""


def test_further_views_of_pictures_in_memory_are_shifted_each_by_its_own_pixels(studio):
    """Found by trying all shifts of a picture with reflected borders, written out in numpy."""
    studio.views, side, reach = 6, 16, 1
    cache = build(studio)
    assert is_right(studio, cache)
    wide = np.pad(studio.images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), "reflect")
    for view in range(2, 6):
        pixels = wide[:, :, ::-1] if view % 2 else wide
        shifts = [(down, right) for down in range(3) for right in range(3)]
        found = np.stack([tokens_of(studio, pixels[:, down:down + side, right:right + side])
                          for down, right in shifts])
        fits = (found == cache[view]).all(2)               # (shifts, pictures)
        assert fits.any(0).all()
        assert (fits.sum(1) > 0).sum() >= 6, "pictures are shifted in different ways"
    assert len({view.tobytes() for view in cache}) == 6


def test_a_view_does_not_depend_on_which_pictures_are_encoded_together():
    image, rows = torch.rand(20, 3, 32, 32), np.arange(20)
    for view in (0, 1, 2, 3, 7):
        whole = views.view_of(image, view, rows, 20)
        parts = [views.view_of(image[part], view, part, 20)
                 for part in np.split(rows, [3, 11])]
        assert torch.equal(whole, torch.cat(parts)) and whole.shape == image.shape
    tiny = torch.rand(2, 3, 8, 8)
    unmoved = views.view_of(tiny, 4, rows[:2], 20)
    assert torch.equal(unmoved, tiny), "no room to shift eight pixels"


def test_pictures_in_files_get_a_crop_for_each_view_and_are_known_by_their_names(
        studio, picture_folder, tmp_path, capsys, monkeypatch):
    def load():
        return folder.load("train", data_dir=tmp_path / "pictures", size=16)[0]
    one, *_ = sorted(shutil.copytree(picture_folder, tmp_path / "pictures").glob("bee/*"))
    images = studio.images = load()
    studio.views, decoded, decode = 3, [], folder.decode
    monkeypatch.setattr(folder, "decode", lambda path, enough: decoded.append(path) or decode(
        path, enough))
    cache = build(studio)
    assert len(decoded) == 20 + 57, "20 for the fingerprint; each file once for all views"
    cuts = zip(*[images.crops(i, [-1, 0, 1]) for i in range(57)])
    assert np.array_equal(cache, [tokens_of(studio, np.stack(view)) for view in cuts])
    assert len({view.tobytes() for view in cache}) == 3 and capsys.readouterr().out == ""
    for change, count in ((Path.rename, 57), (shutil.copy, 58)):      # the order stays the same
        change(one, other := one.with_stem(one.stem + "5"))
        one, studio.images = other, load()
        build(studio)
        assert studio.encoded == 3 * count and "pictures changed" in capsys.readouterr().out


@pytest.mark.parametrize("V, dtype", [(65535, np.uint16), (65536, np.int32), (2 ** 17, np.int32)])
def test_what_stands_for_a_missing_token_is_never_a_token(studio, V, dtype):
    studio.tokenizer = m2.MultiScaleVQVAE(m2.TokenizerConfig(**{
        **vars(studio.tokenizer.config), "vocab_size": V}))
    studio.make = lambda _, image: [torch.tensor([0, V - 2, V - 1])[
        torch.randint(3, (len(image), n))] for n in (1, 4, 16)]
    interrupt(studio)
    cache = build(studio)
    assert studio.encoded == 44 and cache.dtype == dtype
    assert cache.min() == 0 and cache.max() == V - 1


@pytest.mark.parametrize("what, change", [
    ("tokenizer", lambda s: torch.nn.init.normal_(s.tokenizer.quant_conv.weight)),
    ("pictures", lambda s: vars(s).update(images=s.images[:20])),
    ("views", lambda s: vars(s).update(views=1)),
    ("dataset, views", lambda s: vars(s).update(views=1, _=vars(s.settings).update(dataset=1))),
    *[("pictures", lambda s, at=at: np.bitwise_xor.at(s.images, at, 1)) for at in (
        (0, 0, 0, 0), (31, 15, 15, 2), (7, 3, 12, 1), (22, 9, 0, 0))]])
@pytest.mark.parametrize("half", [False, True])
def test_a_stale_cache_is_made_again_and_one_line_tells_why(studio, what, change, half, capsys):
    studio.images = studio.images.copy()
    interrupt(studio) if half else build(studio)           # half a cache is just not continued
    change(studio)
    assert is_right(studio, build(studio)) and studio.encoded == studio.views * len(studio.images)
    found = re.findall("tokens of train: (.*) changed since", out := capsys.readouterr().out)
    assert (found, out.count("\n")) == (([], 0) if half else ([what], 1))


@pytest.mark.parametrize("end", [".npy", ".json", ".npy.tmp", ".npy.json.tmp"])
def test_a_damaged_file_of_the_cache_means_that_it_is_made_again(studio, end):
    for damage in (lambda old: b"", lambda old: old[:-9], lambda old: old.replace(b"(2,", b"(1,"),
                   lambda old: b"PK\3\4" + old, lambda old: b'[{"a":', lambda old: b"[1]",
                   lambda old: old[:8] + b"\1" + old[9:], lambda old: old.replace(b"<u2", b"<f2")):
        interrupt(studio) if end.endswith("tmp") else build(studio)
        path = studio.folder.path / f"tokens_train{end}"
        path.write_bytes(damage(old := path.read_bytes()))
        fits = path.read_bytes() == old                    # a note has no shape
        assert is_right(studio, build(studio)) and (fits or studio.encoded == 64)
        torch.nn.init.normal_(studio.tokenizer.quant_conv.weight)


def test_an_interrupted_cache_is_finished_and_only_what_is_missing_is_encoded(studio, capsys):
    build(studio)
    whole = studio.path.rename(studio.path.with_name("whole")).read_bytes()
    interrupt(studio, after=20)                            # crashes; goes on, until a signal comes
    studio.halt = lambda: vars(studio.stop).update(number=signal.SIGTERM)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        build(studio, limit=20)
    assert re.search("resuming.*same command", capsys.readouterr().out, re.S)
    assert studio.encoded == 24, "the four that it was at were to be finished"
    np.load(f"{studio.path}.tmp", mmap_mode="r+")[0, 9, 5:] = 65535    # half a row of another four
    studio.stop.number = 0
    assert is_right(studio, build(studio)) and studio.encoded == 64 - 20 - 24 + 4
    assert studio.path.read_bytes() == whole


def only_cache(tiny, run):
    """A new run that has its tokenizer. -> command that makes its cache alone"""
    run.mkdir()
    shutil.copy(tiny.folder / "tokenizer.pt", run)
    return ["05_train.py", *tiny.options, "--stage", "transformer", "--steps", 0, "--out", run]


class FullDisk(io.FileIO):
    def write(self, content):
        super().write(content[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("full", ["for tokens", "for the note", "by order of the kernel"])
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(
        refused, tiny, tmp_path, monkeypatch, full):
    resource, run = pytest.importorskip("resource"), tmp_path / "run"
    limits, kernel = resource.getrlimit(resource.RLIMIT_FSIZE), "kernel" in full
    if full == "for tokens":
        monkeypatch.setattr(token_cache, "open", FullDisk, raising=False)
    elif full == "for the note":
        monkeypatch.setattr(Path, "write_text", lambda path, _: FullDisk(path, "w").write(b"{"))
    command = only_cache(tiny, run)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]) if kernel else limits)
        line = refused(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    why = "File too large" if kernel else "No space left"
    assert re.search(rf"tokens_train\.npy.*, 0\.0 MB: {why}", line), line
    left = {path.name for path in run.iterdir()} - {".lock"}
    assert left == {"tokenizer.pt"}, "half a file stays behind"
    assert (run / "tokenizer.pt").read_bytes() == (tiny.folder / "tokenizer.pt").read_bytes()


def test_a_process_killed_while_it_encodes_is_continued_bit_for_bit(
        cli, tiny, tmp_path, monkeypatch):
    run, whole, filled = tmp_path / "killed", tmp_path / "whole", 0
    process = tiny.start(*(command := [*only_cache(tiny, run), "--views", 150]), cwd=tmp_path)
    while filled < 3 and process.poll() is None:
        time.sleep(0.005)
        if (run / "tokens_train.npy.json.tmp").exists():
            half = np.load(run / "tokens_train.npy.tmp", mmap_mode="r")
            filled = (half != 65535).all((1, 2)).sum()
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    missing, encoded = (half == 65535).any((1, 2)).sum(), []
    real = m2.MultiScaleVQVAE.image_to_tokens
    monkeypatch.setattr(m2.MultiScaleVQVAE, "image_to_tokens",
                        lambda self, image: encoded.append(len(image)) or real(self, image))
    assert (result := cli(*command)).out.count("resuming where") == 1, result
    assert 0 < missing < 150 and sum(encoded) == missing * 57 + 3, "57 to train on, 3 held out"
    assert cli(*only_cache(tiny, whole), "--views", 150).status == 0
    for name in ("tokens_train.npy", "tokens_train.json", "tokens_test.npy"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_two_processes_write_the_cache_that_one_writes(tiny, tmp_path):
    """The one of the training set they only finish, the other is all theirs."""
    command = only_cache(tiny, run := tmp_path / "two")
    shutil.copy(tiny.folder / "tokens_train.json", run / "tokens_train.npy.json.tmp")
    half = shutil.copy(tiny.folder / "tokens_train.npy", run / "tokens_train.npy.tmp")
    cache = np.load(half, mmap_mode="r+")
    cache[0, 20:40] = cache[1] = 65535
    process = tiny.start(*command, "--gpus", 2, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and out.count("resuming where") == 1, err
    for name in ("tokens_train.npy", "tokens_train.json", "tokens_test.npy", "tokens_test.json"):
        assert (run / name).read_bytes() == (tiny.folder / name).read_bytes()
