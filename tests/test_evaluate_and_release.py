"""What is measured on samples and given to others, and released weights that come over the network:
the judge's table and neighbours, --export-npz, downloads, precision, and the study of editing."""
import contextlib
import io
import json
import math
import re
import shutil
import weakref
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as few
from hypothesis import strategies as st
from PIL import Image

from data import batches, folder, shapes
from engine import BadInput, released
from report import judge, plots
from test_files import hub                                 # noqa: F401

m5, m6 = import_module("05_train"), import_module("06_sample_and_edit")
HERE = Path(__file__).parent
SCRIPT = "06_sample_and_edit.py"
SHAPES = json.loads((HERE / "golden" / "tiny_keys.json").read_text())
NAMES = ("ant", "bee", "cat")                              # the classes of the tiny run


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def printed(call, *args):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        call(*args)
    return out.getvalue()


class Weighed(np.ndarray):
    """An array that can be watched and be a member of a set."""
    __hash__ = object.__hash__
    __eq__ = object.__eq__


# -- Features and neighbours -----------------------------------------------------------------------

def untrained(classes=3, size=16):
    """A judge that has learnt nothing tells pictures apart all the same; the last norm turned up,
    so that its distances have digits before the point."""
    torch.manual_seed(0)
    network = judge.Judge(classes, size).eval()
    with torch.no_grad():
        network.body[-2].weight.mul_(300)
        network.head.weight.mul_(10)
    return network


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_features_batch_after_batch_are_those_of_all(sizes, seed):
    network, images = untrained(), torch.rand(sum(sizes), 3, 16, 16, generator=seeded(seed))
    together = judge.extract(network, images)
    for a, b in zip(judge.extract_all(network, iter(images.split(sizes))), together, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-3)


@few(max_examples=15)
@given(n=st.sampled_from([1, 3, 99, 101, 230]), m=st.integers(1, 9), width=st.integers(1, 4),
       seed=st.integers(0, 99))
def test_distances_and_nearest_equal_the_slow_loop(n, m, width, seed):
    a, b = torch.randn(n + m, width, generator=seeded(seed)).split([n, m])
    slow = [[math.sqrt(sum((x - y) ** 2 for x, y in zip(p, q))) for q in b.tolist()]
            for p in a.tolist()]
    found = judge.distances(a, b)
    assert found.shape == (n, m) and torch.allclose(found, torch.tensor(slow), atol=1e-5)
    nearest = judge.nearest_neighbours(a, b)
    assert nearest.dtype == torch.int64
    assert nearest.tolist() == [min(range(m), key=row.__getitem__) for row in slow]


class Wall:
    """Stands in for the studio: keeps what it is told to save."""

    def save(self, name, images, columns, row_labels):
        self.name, self.columns, self.row_labels = name, columns, row_labels
        self.rows = images.split(columns)


def shares(text):
    """The printed medians, of samples and of held-out pictures, and the share of near samples."""
    median, floor, share = re.search(
        r"samples are ([\d.]+) away .*held-out pictures ([\d.]+); ([\d.]+)%", text).groups()
    return float(median), float(floor), float(share) / 100


def test_copies_of_training_pictures_are_found_out():
    """40 of 41 samples are training pictures, to the pixel: 97.6 %."""
    network, wall = untrained(), Wall()
    real = torch.from_numpy(shapes.draw(range(120), size=16)[0])
    held_out = shapes.draw(range(60), split="test", size=16)[0]
    order = torch.randperm(120, generator=seeded())[:40]
    samples = real[order].permute(0, 3, 1, 2).float() / 255
    samples = torch.cat([samples, 1 - samples[:1]])
    floor, fake = (judge.extract(network, x)[0] for x in (held_out, samples))
    out = printed(judge.neighbours, wall, network, real, samples[:16], floor, fake)
    assert wall.name == "neighbours" and wall.columns == 16
    assert [text.split()[-1] for text in wall.row_labels] == ["sample", "features", "pixels"]
    for row in wall.rows:
        assert torch.allclose(row, samples[:16], atol=1e-6)
    median, by_chance, share = shares(out)
    assert median == 0 < by_chance and share == 0.976
    assert "nearest of 120 training pictures" in out


def test_neighbours_equal_the_slow_search_and_count_against_held_out_pictures():
    network, wall = untrained(), Wall()
    real = torch.from_numpy(shapes.draw(range(40), size=16)[0])
    held_out = shapes.draw(range(30), split="test", size=16)[0]
    samples = torch.from_numpy(shapes.draw(range(30, 57), split="test", size=16)[0])
    samples = samples.permute(0, 3, 1, 2).float() / 255 * 0.9
    floats = real.permute(0, 3, 1, 2).float() / 255
    known, floor, fake = (judge.extract(network, x)[0] for x in (floats, held_out, samples))
    out = printed(judge.neighbours, wall, network, real, samples[:5], floor, fake)
    assert [len(row) for row in wall.rows] == [5, 5, 5]
    for row, points, all_points in ((1, fake, known), (2, samples.flatten(1), floats.flatten(1))):
        for n in range(5):
            apart = [float((points[n].double() - x.double()).norm()) for x in all_points]
            assert torch.allclose(wall.rows[row][n], floats[apart.index(min(apart))], atol=1e-6)
    near = [sorted(min(float((x.double() - y.double()).norm()) for y in known) for x in part)
            for part in (fake, floor)]
    limit = near[1][0] + 0.29 * (near[1][1] - near[1][0])  # 1 % of the way from 0 to 29
    share = sum(x < limit for x in near[0]) / 27
    assert shares(out) == (pytest.approx(near[0][13], abs=6e-3),
                           pytest.approx(near[1][14], abs=6e-3), pytest.approx(share, abs=6e-4))


# -- evaluate --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The tiny run with 8 + 8 + 8 pictures to train on and as many held out: .folder, .data, and
    the judge that stands in for a trained one."""
    root = tmp_path_factory.mktemp("judged")
    for split in ("train", "test"):
        drawn = shapes.draw(range(24), split=split, size=16)[0]
        for i, image in enumerate(drawn):
            path = root / "pictures" / split / NAMES[i % 3] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    (root / "run").mkdir()
    for part in ("tokenizer.pt", "transformer.pt"):        # as light as can be: read many times
        state = torch.load(tiny.folder / part, weights_only=True)
        torch.save({**state, "optimizers": None, "dataset": str(root / "pictures")},
                   root / "run" / part)
    return SimpleNamespace(folder=root / "run", data=root / "pictures", judge=untrained())


@pytest.fixture
def evaluate(cli, run, monkeypatch, tmp_path):
    """evaluate(*options): --task evaluate with the untrained judge. -> result, folder"""
    def call(*options):
        monkeypatch.setattr(judge, "load_or_train", lambda *args, **how: run.judge)
        return cli(SCRIPT, "--run", run.folder, "--device", "cpu", "--task", "evaluate", "--out",
                   tmp_path / "made", *options), tmp_path / "made"
    call.judge = run.judge
    return call


@torch.no_grad()
def expected_rows(run, count):
    """What the table must say: (share as meant, distance, precision, recall) of its three rows."""
    train, test = (folder.load(s, data_dir=run.data, size=16) for s in ("train", "test"))
    rows = batches.rows_of(24, count)
    known = judge.extract(run.judge, batches.sample_of(train[0], count).numpy())[0]
    held_out = np.stack([test[0][int(i)] for i in rows])
    tokenizer, _ = m5.load_tokenizer(run.folder / "tokenizer.pt")
    var, about = m5.load_transformer(run.folder / "transformer.pt")
    image = torch.from_numpy(held_out).permute(0, 3, 1, 2).float() / 127.5 - 1
    rebuilt = tokenizer.tokens_to_image(tokenizer.image_to_tokens(image))
    wanted = [i % 3 for i in range(count)]
    drawn = m6.generate(tokenizer, var, torch.tensor(wanted), generator=seeded(),
                        temperature=1.0, **{**about["sampling"], "cfg": 2.5})
    found = []
    for images, labels in (((image + 1) / 2, test[1][rows]), ((rebuilt + 1) / 2, test[1][rows]),
                           (drawn, wanted)):
        features, logits = judge.extract(run.judge, images)
        right = [int(a) == int(b) for a, b in zip(logits.argmax(1), labels)]
        found.append((sum(right) / count, judge.frechet_distance(known, features),
                      *judge.precision_recall(known, features)))
    return found


def test_the_judges_table_has_the_figures_of_three_kinds_of_pictures(evaluate, run):
    result, made = evaluate("--n", 11, "--cfg", 2.5)
    assert result.status == 0, result.err
    table = re.findall(r"^(\S.*?)  +([\d.]+)% +([\d.]+) +([\d.]+) +([\d.]+)$", result.out, re.M)
    names = [row[0].split()[0].strip(",") for row in table]
    assert names == ["held-out", "reconstructions", "samples"] and "cfg 2.5" in table[2][0]
    for row, (right, distance, precision, recall) in zip(table, expected_rows(run, 11)):
        assert float(row[1]) == pytest.approx(100 * right, abs=0.06)
        assert float(row[2]) == pytest.approx(distance, abs=6e-4, rel=1e-3)
        assert [float(x) for x in row[3:]] == pytest.approx([precision, recall], abs=6e-3)
    right = judge.accuracy(run.judge, *folder.load("test", data_dir=run.data, size=16)[:2])
    assert f"judge: {right:.2%} right on 24 held-out" in result.out
    assert "11 pictures a row" in result.out
    assert "nearest of 24 training pictures" in result.out
    with Image.open(made / "neighbours.png") as sheet:     # 11 columns, 3 rows
        sheet.load()
        assert 11 * 96 <= sheet.width < 11 * 104 + 160 and 3 * 96 <= sheet.height < 3 * 104 + 20
        assert len(set(sheet.resize((40, 40)).tobytes())) > 20, "an empty picture"


def test_all_samples_are_judged_sixteen_shown_and_none_kept(evaluate, monkeypatch):
    """24 in batches of 5. Whenever the next batch is asked for, at most the last one is still in
    memory."""
    labels, alive, most, seen = [], weakref.WeakSet(), [], []
    every = np.random.default_rng(0).random((24, 3, 16, 16), np.float32)

    def drawn(self, wanted, **changes):
        labels.extend(wanted)
        for rows in np.array_split(every, 5):
            batch = np.copy(rows).view(Weighed)            # the tensor keeps this array alive
            alive.add(batch)
            yield torch.from_numpy(batch)
            del batch
            most.append(len(alive))
    monkeypatch.setattr(m6.Studio, "batches", drawn)
    monkeypatch.setattr(judge, "neighbours", lambda *args: seen.append(args[3:]))
    result, _ = evaluate("--n", 24)
    assert result.status == 0, result.err
    ((shown, floor, fake),) = seen
    assert torch.equal(shown, torch.from_numpy(every[:16])) and len(floor) == len(fake) == 24
    again = judge.extract(evaluate.judge, torch.from_numpy(every))[0]
    assert torch.allclose(fake, again, atol=1e-3)
    assert labels == [0, 1, 2] * 8 and len(most) == 5 and max(most) <= 1


def test_labels_of_a_part_of_the_classes_are_the_models_own(run, tmp_path):
    """A folder that lacks a class numbers the others anew; one that has another is refused."""
    studio = object.__new__(m6.Studio)
    studio.names, studio.side, studio.args = list(NAMES), 16, SimpleNamespace(data_dir="")
    for split in ("train", "test"):
        shutil.copytree(run.data / split, tmp_path / split)
        shutil.rmtree(tmp_path / split / "ant")
    studio.dataset = str(tmp_path)
    images, labels = studio.load("test")
    assert labels.tolist() == [1] * 8 + [2] * 8 and len(images) == 16
    studio.names = ["ant", "bee"]
    with pytest.raises(BadInput, match="cat"):
        studio.load("test")


@pytest.mark.parametrize("n, right", [(3, False), (4, True)])
def test_four_pictures_of_each_kind_are_enough(evaluate, n, right):
    result, _ = evaluate("--n", n)
    assert result.status == (0 if right else 2), result.err
    assert right or "4 pictures" in result.err and result.err.count("\n") == 1


# -- Export ----------------------------------------------------------------------------------------

@pytest.fixture
def export(cli, run, tmp_path, monkeypatch):
    """export(file, *options): chapter 6 with --export-npz. -> result. All that was sampled:
    export.labels, export.parts; export.draw, if set, draws instead of the model."""
    monkeypatch.setattr(m6.Studio, "batches", _listen(m6.Studio.batches, lambda: call))

    def call(file, *options):
        return cli(SCRIPT, "--run", run.folder, "--device", "cpu", "--out", tmp_path / "made",
                   "--export-npz", file, *options)
    call.draw = None
    return call


def _listen(batches_of, heard):
    def listening(self, labels, **changes):
        heard().labels, heard().parts = list(labels), []
        if heard().draw:
            yield from heard().draw(labels)
            return
        for part in batches_of(self, labels, **changes):
            heard().parts.append(part.clone())
            yield part
    return listening


def test_exported_pixels_are_those_of_a_png_and_classes_take_turns(export, tmp_path, monkeypatch):
    monkeypatch.setattr(m6.Studio, "at_once", lambda self: 4)      # 15 pictures: 4 + 4 + 4 + 3
    result = export("a.npz", "--n", 5, "--seed", 3)
    assert result.status == 0 and "15 pictures, 3 classes" in result.out, result.err
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        found = file["arr_0"]
    assert found.shape == (15, 16, 16, 3) and found.dtype == np.uint8
    assert [len(part) for part in export.parts] == [4, 4, 4, 3]
    assert export.labels == [0, 1, 2] * 5
    drawn = torch.cat(export.parts)
    plots.save_grid(tmp_path / "a.png", drawn, 1, scale=1, gap=0)
    with Image.open(tmp_path / "a.png") as sheet:
        assert (found.reshape(15 * 16, 16, 3) == np.array(sheet)).all()
    slow = [[[[int(255 * v + 0.5) for v in pixel] for pixel in row] for row in picture]
            for picture in drawn.permute(0, 2, 3, 1).tolist()]
    assert (found == np.array(slow)).all()
    assert len(np.unique(found.reshape(15, -1), axis=0)) == 15, "a picture twice"
    assert {p.name for p in tmp_path.iterdir()} == {"a.npz", "a.png", "made"}
    assert not list((tmp_path / "made").iterdir()), "nothing else is made"


@pytest.mark.parametrize("options, labels", [
    ((), [0, 1, 2] * 50), (("--n", 2, "--classes", "cat", "0"), [2, 0, 2, 0]),
    (("--n", 3, "--classes", "1"), [1, 1, 1])])
def test_every_class_fifty_times_unless_asked_otherwise(export, tmp_path, options, labels):
    assert export("a.npz", *options).status == 0
    assert export.labels == labels
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_0"].shape == (len(labels), 16, 16, 3)


def test_a_run_without_a_transformer_exports_nothing(refused, run, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(run.folder / "tokenizer.pt", tmp_path / "run")
    line = refused(SCRIPT, "--run", tmp_path / "run", "--device", "cpu", "--task", "reconstruct",
                   "--export-npz", "a.npz")
    assert "transformer.pt" in line and not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize("error, status", [(OSError("the disk is full"), 2),
                                           (KeyboardInterrupt(), 130)])
@pytest.mark.parametrize("before", [None, b"what was there"])
def test_half_an_export_leaves_nothing_and_spoils_nothing(export, tmp_path, error, status, before):
    path, there = tmp_path / "for others" / "a.npz", []
    path.parent.mkdir()
    if before:
        path.write_bytes(before)

    def draw(labels):
        yield torch.rand(4, 3, 16, 16)
        there.extend(p for p in path.parent.iterdir() if p != path)
        raise error
    export.draw = draw
    result = export(path, "--n", 2)
    assert result.status == status and result.err.count("\n") <= 1, result.err
    assert len(there) == 1, "what is half written lies beside"
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == (
        {"a.npz": before} if before else {})


@pytest.mark.parametrize("where", [".", "missing/a.npz", "made/../..", "text/a.npz"])
def test_an_export_that_has_nowhere_to_go_is_refused_before_sampling(
        refused, run, tmp_path, monkeypatch, where):
    monkeypatch.setattr(m6, "generate", lambda *args, **how: pytest.fail("sampled for nothing"))
    (tmp_path / "text").write_text("no folder")
    line = refused(SCRIPT, "--run", run.folder, "--device", "cpu", "--out", tmp_path / "made",
                   "--export-npz", where)
    assert "--export-npz" in line and where in line
    assert {p.name for p in tmp_path.iterdir()} == {"made", "text"}


def test_an_existing_export_is_replaced_and_pictures_are_forgotten_once_written(export, tmp_path):
    """Whenever the next batch is asked for, at most the last one is still in memory."""
    (tmp_path / "a.npz").write_bytes(b"what was there")
    alive, most = weakref.WeakSet(), []
    every = np.random.default_rng(0).random((30, 3, 16, 16), np.float32)

    def draw(labels):
        for rows in np.split(every, 10):
            batch = np.copy(rows).view(Weighed)            # the tensor keeps this array alive
            alive.add(batch)
            yield torch.from_numpy(batch)
            del batch
            most.append(len(alive))
    export.draw = draw
    assert export("a.npz", "--n", 10).status == 0
    assert len(most) == 10 and max(most) <= 1
    with np.load(tmp_path / "a.npz") as file:
        assert abs(file["arr_0"].transpose(0, 3, 1, 2) / 255 - every).max() <= 0.5 / 255 + 1e-6


# -- Released models from the command line ---------------------------------------------------------

@pytest.fixture(scope="module")
def released_files():
    """Two tiny models in the published layouts, d16 and (shared modulation, as published) d36, as
    files, and the sides of their token maps."""
    torch.manual_seed(0)
    files = {}
    for name, layout in (("var_d16.pth", "plain"), ("var_d36.pth", "shared_adaln"),
                         ("vae_ch160v4096z32.pth", "plain")):
        out, part = io.BytesIO(), name[:3]
        torch.save({key: 0.1 * torch.randn(shape) for key, shape in SHAPES[layout][part].items()},
                   out)
        files[name] = out.getvalue()
    return files, tuple(SHAPES["plain"]["config"]["patch_nums"])


@pytest.fixture
def offered(hub, monkeypatch, cli, tmp_path, released_files):    # noqa: F811
    """The hub offers the two models. offered(*options): chapter 6 on the CPU -> result;
    offered.hub"""
    hub.files, scales = dict(released_files[0]), released_files[1]
    monkeypatch.setattr(released, "URL", hub.url)
    monkeypatch.setitem(released.SCALES, sum(side * side for side in scales), scales)

    def call(*options):
        return cli(SCRIPT, "--device", "cpu", "--out", tmp_path / "made", *options)
    call.hub = hub
    return call


def test_a_released_model_samples_from_the_command_line(offered, tmp_path):
    result = offered("--released", "d16", "--task", "sample", "--n", 2, "--classes", "class 3")
    assert result.status == 0, result.err
    for name in ("samples", "coarse_to_fine"):
        with Image.open(tmp_path / "made" / f"{name}.png") as sheet:
            sheet.load()
            assert sheet.width >= 2 * 64 and len(set(sheet.resize((40, 40)).tobytes())) > 20


@pytest.mark.parametrize("name", ["d16", "d36"])
def test_a_released_model_is_downloaded_once(offered, name):
    files, made = ["vae_ch160v4096z32.pth", f"var_{name}.pth"], []
    for _ in range(2):
        result = offered("--released", name, "--export-npz", "a.npz", "--n", 1, "--classes", "3")
        assert result.status == 0, result.err
        assert offered.hub.seen == [(file, None) for file in files]
        with np.load("a.npz") as file:
            made.append(file["arr_0"])
        assert ("downloading" in result.out) == (len(made) == 1)
    assert (made[0] == made[1]).all() and np.ptp(made[0]) > 20
    assert {p.name: p.read_bytes() for p in offered.hub.folder.iterdir()} == {
        file: offered.hub.files[file] for file in files}


def test_an_interrupted_download_of_a_model_goes_on_with_the_same_command(offered, refused):
    hub, options = offered.hub, ("--released", "d16", "--export-npz", "a.npz", "--n", 1)
    hub.cut = 100_000
    line = refused(SCRIPT, "--device", "cpu", *options)
    assert "the same command goes on" in line and "broke off after 100000 of" in line
    hub.cut = None
    assert offered(*options).status == 0
    assert hub.seen == [("vae_ch160v4096z32.pth", None), ("vae_ch160v4096z32.pth", "bytes=100000-"),
                        ("var_d16.pth", None)]


@pytest.mark.parametrize("precision", ["auto", "float16", "bfloat16"])
def test_the_transformer_samples_in_the_numbers_asked_for(offered, monkeypatch, precision):
    seen, draw = [], m6.generate
    monkeypatch.setattr(m6, "generate", lambda *models, **how: seen.append(models) or
                        draw(*models, **how))
    result = offered("--released", "d16", "--export-npz", "a.npz", "--n", 2, "--classes", "0",
                     "--precision", precision)
    assert result.status == 0, result.err
    (tokenizer, var, _), = seen
    wanted = torch.float32 if precision == "auto" else getattr(torch, precision)
    layers = [x for x in var.modules() if isinstance(x, torch.nn.Linear)]
    assert {x.weight.dtype for x in layers} == {wanted} and len(layers) > 5
    for name, x in tokenizer.named_parameters():          # what encodes stays exact
        decodes = name.startswith(("decoder", "post_quant_conv"))
        assert x.dtype == (wanted if decodes else torch.float32), name
    with np.load("a.npz") as file:
        assert file["arr_0"].shape == (2, 64, 64, 3) and np.ptp(file["arr_0"]) > 20
    assert re.search(r"released model: tokenizer \d+ M, transformer \d+ M parameters, \d\.\d GB; "
                     r"\d+ pictures at once", result.out)


@pytest.mark.parametrize("options", [
    "--released d16 --task density", "--released d16 --task evaluate",
    "--released d36 --classes 10",
    "--released d16 --precision float64", "--released d16 --classes goldfish",
    "--released d20 --task sample"])
def test_what_a_released_model_cannot_do_is_one_line(offered, refused, options):
    refused(SCRIPT, "--device", "cpu", *options.split())


# -- How many at once, in which numbers ------------------------------------------------------------

D16 = dict(depth=16, width=1024, L=680)


def make_studio(device="cpu", precision="auto", files=None, name=None, channels=160, side=256,
                **transformer):
    """A studio that knows sizes and options alone."""
    sizes = {**D16, **transformer}
    studio = object.__new__(m6.Studio)
    studio.chapter, studio.device = m6, torch.device(device)
    studio.args = SimpleNamespace(precision=precision, released=name, var_file=files)
    studio.var = SimpleNamespace(L=sizes.pop("L"), config=SimpleNamespace(**sizes))
    studio.tokenizer = SimpleNamespace(config=SimpleNamespace(channels=channels, image_size=side))
    return studio


@contextlib.contextmanager
def gpu(total, free):
    """Pretend that there is a GPU of so many bytes, so many of them free."""
    answers = dict(get_device_properties=SimpleNamespace(total_memory=total),
                   mem_get_info=(free, total), memory_allocated=total - free,
                   memory_reserved=total - free)
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda *device, answer=answer: answer)
        yield


@pytest.mark.parametrize("options, dtype, fast", [
    (dict(), "float32", False), (dict(), "bfloat16", True), (dict(device="cuda"), "float16", True),
    (dict(width=256), "float32", True), (dict(device="cuda", width=256), "float32", True),
    (dict(device="mps"), "float32", False), (dict(precision="bfloat16"), "bfloat16", False),
    (dict(device="cuda", precision="float32"), "float32", True),
    (dict(precision="float16"), "float16", True)])
def test_half_precision_is_for_large_models_where_it_is_fast_unless_asked_for(
        options, dtype, fast, monkeypatch):
    answers = iter([fast])                                 # asked once: timing it may vary
    monkeypatch.setattr(import_module("report.studio"), "fast_bfloat16", lambda _: next(answers))
    studio = make_studio(**options)
    for _ in range(2):
        assert studio.precision is getattr(torch, dtype)


@few(max_examples=60)
@given(total=st.integers(0, 2 ** 38), free=st.lists(st.floats(0, 1), min_size=2, max_size=2),
       depth=st.integers(1, 40), width=st.integers(1, 4000), L=st.integers(1, 3000),
       side=st.integers(8, 1024), half=st.booleans())
def test_pictures_at_once_are_1_to_100_fit_and_do_not_depend_on_what_is_free(
        total, free, depth, width, L, side, half):
    sizes = dict(depth=depth, width=width, L=L, side=side,
                 precision="float16" if half else "float32")
    counts = []
    for share in free:
        with gpu(total, int(share * total)):
            counts.append(make_studio("cuda", **sizes).at_once())
    assert counts[0] == counts[1] and type(counts[0]) is int and 1 <= counts[0] <= 100
    # Keys and values, with the class and without, of every block and token.
    each = 2 * 2 * depth * L * width * (2 if half else 4)
    assert counts[0] == 1 or counts[0] * each <= total
    with gpu(2 * total, 0):
        assert make_studio("cuda", **sizes).at_once() >= counts[0]
    assert 1 <= make_studio("cpu", **sizes).at_once() <= 100


def test_more_memory_or_smaller_numbers_mean_more_pictures():
    with gpu(80 * 10 ** 9, 0):
        many, half = (make_studio("cuda", precision=p, depth=30, width=1920).at_once()
                      for p in ("float32", "float16"))
    with gpu(16 * 10 ** 9, 0):
        few_ = make_studio("cuda", precision="float32", depth=30, width=1920).at_once()
    assert 1 < few_ < many < half < 100
    assert make_studio(channels=8, side=16, depth=2, width=16, L=21).at_once() == 100


def test_what_is_loaded_is_said_in_millions_and_gigabytes(monkeypatch, capsys):
    """The size of d36: 4 x 0.109 + 2 x 2.35 = 5.1 GB in half precision, 9.8 in full."""
    class Large:
        config = SimpleNamespace(num_classes=10, depth=36, width=2304, channels=160, image_size=512)
        L = 2240

        def __init__(self, *counts):
            self.counts = counts

        def parameters(self):
            return [torch.empty(count, device="meta") for count in self.counts]

        def to(self, device):
            return self
    monkeypatch.setattr(m6, "load_released", lambda *states: states)
    monkeypatch.setattr(released, "fetch", lambda name, given: Large(
        *([10 ** 8, 9 * 10 ** 6] if "vae" in name else [2 * 10 ** 9, 350 * 10 ** 6])))
    for precision, gigabytes in (("float16", "5.1"), ("float32", "9.8")):
        studio = make_studio(name="d36", precision=precision)
        studio.args.tokenizer_file, studio.args.data_dir = None, ""
        assert studio.load_released() == "released" and studio.names[9] == "class 9"
        assert capsys.readouterr().out == (
            "released model: tokenizer 109 M, transformer 2350 M parameters, "
            f"{gigabytes} GB; {studio.at_once()} pictures at once\n")


# -- The study of editing --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def study():
    return import_module("experiments.editing")


def test_a_seam_by_hand(study):
    """One row, kept | hidden after the third pixel: the steps are 1 2 [6] 4 1."""
    row = torch.tensor([0.0, 1, 3, 9, 13, 14])
    image = row.expand(1, 3, 2, 6).clone()
    keep = (torch.arange(6) < 3).expand(2, 6)
    assert study.seam(image, keep) == pytest.approx(6 / 3)
    assert study.seam(image.mT, keep.mT) == pytest.approx(6 / 3)
    assert study.seam(-image, ~keep) == pytest.approx(6 / 3)
    first = torch.arange(6).expand(2, 6) < 1               # steps [1] 2: nothing before the first
    assert study.seam(image, first) == pytest.approx(1 / 2)
    assert study.seam(image, torch.arange(6).expand(2, 6) < 5) == pytest.approx(1 / 4)


def slow_seam(image, keep):
    across, beside = [], []
    for picture in image:
        for plane, mask in ((picture, keep), (picture.mT, keep.mT)):
            height, width = mask.shape
            for y in range(height):
                edges = [bool(mask[y, x] != mask[y, x + 1]) for x in range(width - 1)]
                for x, edge in enumerate(edges):
                    step = sum(abs(float(plane[c, y, x + 1] - plane[c, y, x])) for c in range(3))
                    if edge:
                        across.append(step / 3)
                    elif any(edges[max(x - 1, 0):x + 2]):
                        beside.append(step / 3)
    return across, beside


@given(height=st.integers(2, 6), width=st.integers(2, 6), share=st.sampled_from([0.2, 0.5, 0.8]),
       seed=st.integers(0, 99))
def test_a_seam_equals_the_slow_loop(study, height, width, share, seed):
    image = torch.rand(2, 3, height, width, generator=seeded(seed))
    keep = torch.rand(height, width, generator=seeded(seed + 1)) < share
    before = keep.clone()
    found, (across, beside) = study.seam(image, keep), slow_seam(image, keep)
    assert torch.equal(keep, before)
    if across and beside:
        assert found == pytest.approx(np.mean(across) / np.mean(beside), rel=1e-4)


@given(seed=st.integers(0, 99), count=st.integers(1, 3), share=st.sampled_from([0.3, 1.0]))
def test_the_kept_part_in_decibels_equals_the_slow_loop(study, seed, count, share):
    """Mean of the pictures' own PSNR, not PSNR of their mean error; hidden pixels do not count."""
    one, other = torch.rand(2, count, 3, 4, 5, generator=seeded(seed))
    keep = torch.rand(4, 5, generator=seeded(seed + 1)) < share
    keep[0, 0] = True
    db = []
    for a, b in zip(one, other):
        error = [float(a[c, y, x] - b[c, y, x]) ** 2 for c in range(3) for y in range(4)
                 for x in range(5) if keep[y, x]]
        db.append(-10 * math.log10(sum(error) / len(error)))
    assert study.kept_db(one, other, keep) == pytest.approx(sum(db) / count, abs=1e-3)


def test_a_tenth_off_everywhere_is_20_decibels(study):
    original, keep = torch.full((2, 3, 4, 4), 0.5), torch.ones(4, 4, dtype=torch.bool)
    keep[2:] = False
    result = original + 0.1
    result[:, :, 2:] = 0                                   # hidden: whatever it is
    assert study.kept_db(result, original, keep) == pytest.approx(20, abs=1e-4)
    result[1, :, :2] = 0.49                                # the other picture: 40 dB
    assert study.kept_db(result, original, keep) == pytest.approx(30, abs=1e-3)
