"""Density: the tables and the chart, figure by figure against slow loops and hand-worked cases."""
import contextlib
import io
import math
import re
import shutil
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
from engine import BadInput
from report import density, plots, studio

m5, m6 = import_module("05_train"), import_module("06_sample_and_edit")
SCRIPT = "06_sample_and_edit.py"
BIT = math.log(2)                                          # in nats
NAMES = ("ant", "bee", "cat")                              # the classes of the tiny run


def make_studio(scales=(1, 2), V=16, side=4, names=("ant", "bee")):
    """Just what the tables want to know of a studio."""
    return SimpleNamespace(
        tokenizer=SimpleNamespace(scales=scales, config=SimpleNamespace(vocab_size=V)),
        side=side, names=list(names), out=Path("nowhere"))


def printed(call, *args):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        call(*args)
    return out.getvalue()


def rows_of_table(text):
    """Printed lines -> what stands in front of the figures (two spaces or more) -> the figures."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.strip().partition("  ")
        if line.startswith("    ") and rest:
            found[name] = rest.split()
    return found


def shows(text, value):
    """Is `text` the number `value`, as exactly as its digits can say?"""
    if not math.isfinite(value):
        return text == "-"
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10 ** -digits + 1e-5 * max(1, abs(value))


# -- The table of bits -----------------------------------------------------------------------------

def test_bits_of_a_hand_worked_case():
    """Two pictures of 1 + 4 tokens out of 16, 4 x 4 pixels: 3 + 8 and 5 + 12 bits, 14 on average;
    without a class 4 + 16 and 4 + 20."""
    known, none = torch.tensor([[3.0, 8], [5, 12]]), torch.tensor([[4.0, 16], [4, 20]])
    out = printed(density.bits_table, make_studio(), -BIT * known, -BIT * none)
    assert re.match("2 .*without a model every token costs 4 bits$", out.splitlines()[0])
    assert rows_of_table(out) == {
        "side": ["1x1", "2x2", "all"], "tokens": ["1", "4", "5"],
        "bits, class known": ["4.0", "10.0", "14.0"], "bits, no class": ["4.0", "18.0", "22.0"],
        "bits per token": ["4.00", "2.50", "2.80"], "bits per pixel": ["0.250", "0.625", "0.875"]}


@given(scales=st.lists(st.integers(1, 6), min_size=1, max_size=5), V=st.integers(2, 5000),
       count=st.integers(1, 4), side=st.integers(1, 40), seed=st.integers(0, 99))
def test_bits_equal_the_slow_loop(scales, V, count, side, seed):
    nats = -30 * torch.rand(2, count, len(scales), generator=torch.Generator().manual_seed(seed))
    out = printed(density.bits_table, make_studio(scales, V, side), nats[0], nats[1])
    table = rows_of_table(out)
    assert shows(re.search(r"costs (\S+) bits", out)[1], math.log2(V))
    means = []
    for rows in nats:                                      # the class known, no class
        bits = [sum(float(row[k]) for row in rows) / count / -BIT for k in range(len(scales))]
        means.append([*bits, sum(bits)])
    tokens = [s * s for s in scales] + [sum(s * s for s in scales)]
    assert list(map(int, table["tokens"])) == tokens
    for name, values in (("bits, class known", means[0]), ("bits, no class", means[1]),
                         ("bits per token", [b / n for b, n in zip(means[0], tokens)]),
                         ("bits per pixel", [b / side ** 2 for b in means[0]])):
        assert len(table[name]) == len(values) and all(map(shows, table[name], values)), name


# -- Bayes' rule -----------------------------------------------------------------------------------

def accuracies(text):
    """What bayes() printed -> [share over all scales, by chance], [share up to each scale]"""
    first, second = text.splitlines()
    return ([float(x) / 100 for x in re.findall(r"([\d.]+)%", first)],
            [float(x) / 100 for x in re.findall(r"([\d.]+)%", second)])


def test_bayes_of_a_hand_worked_case():
    """Three scales, two classes, two pictures of class 0. Picture 0: the first scale says class 1,
    by 1; the second class 0, by 3. Picture 1: class 0 by 2, class 1 by 1, class 1 by 5."""
    nats = torch.tensor([[[-4.0, -1, -2], [-3, -4, -2]], [[-1.0, -2, -6], [-3, -1, -1]]])
    studio = make_studio(scales=(1, 2, 3))
    out = printed(density.bayes, studio, nats, torch.tensor([0, 0]))
    assert accuracies(out) == ([0.5, 0.5], [0.5, 1.0, 0.5])
    assert "for 50.0% of 2 pictures (by chance 50.0%)" in out
    assert "1x1: 50.0%, 2x2: 100.0%, 3x3: 50.0%" in out
    out = printed(density.bayes, studio, nats, torch.tensor([1, 0]))
    assert accuracies(out)[1] == [1.0, 0.5, 0.0]


@given(classes=st.integers(1, 5), K=st.integers(1, 4), count=st.integers(1, 7),
       seed=st.integers(0, 99))
def test_bayes_equals_the_slow_loop(classes, K, count, seed):
    rng = np.random.default_rng(seed)
    # Whole numbers sum exactly; the classes' own fractions, 0.1 apart, leave no two sums equal.
    nats = -rng.integers(0, 9, (count, classes, K)).astype(float)
    nats[:, :, 0] -= 0.1 * np.arange(classes)
    labels = rng.integers(0, classes, count)
    wanted = []
    for k in range(K):
        right = 0
        for picture, label in zip(nats, labels):
            likelihood = [sum(of_class[:k + 1]) for of_class in picture]
            right += max(range(classes), key=lambda c: likelihood[c]) == label
        wanted.append(right / count)
    (share, chance), each = accuracies(printed(density.bayes, make_studio(range(1, K + 1)),
                                               torch.tensor(nats), torch.tensor(labels)))
    assert each == pytest.approx(wanted, abs=6e-4) and share == each[-1]
    assert chance == pytest.approx(1 / classes, abs=6e-4)


# -- What a file costs -----------------------------------------------------------------------------

def photo(height, width, seed):
    """Smooth colours and some noise: not the same bytes at every quality."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 3 + seed), np.cos(y / 5), np.sin((x + y) / 7)], -1)
    return (127 + 90 * waves + rng.normal(0, 12, waves.shape)).clip(0, 255).astype(np.uint8)


def scan_of(data):
    """The entropy-coded part of a JPEG file, found segment by segment from the front."""
    assert data[:2] == b"\xff\xd8"
    at, scan = 2, None
    while scan is None:
        assert data[at] == 0xff
        length = int.from_bytes(data[at + 2:at + 4], "big")
        if data[at + 1] == 0xda:                           # after its header the picture begins
            scan = at + 2 + length
        at += 2 + length
    end = scan
    while data[end] != 0xff or data[end + 1] == 0 or 0xd0 <= data[end + 1] <= 0xd7:
        end += 1                                           # a stuffed byte or a restart: no end
    assert data[end:] == b"\xff\xd9", "one scan, then the end of the picture"
    return data[scan:end]


def stored(picture, **how):
    out = io.BytesIO()
    Image.fromarray(picture).save(out, **how)
    return out.getvalue()


SIDE = st.integers(1, 40)


@few(max_examples=60)
@given(height=SIDE, width=SIDE, seed=st.integers(0, 99), quality=st.integers(1, 100),
       subsampling=st.sampled_from([0, 2]))
def test_bare_bytes_of_a_jpeg_are_its_scan(height, width, seed, quality, subsampling):
    picture = photo(height, width, seed)
    how = dict(format="JPEG", quality=quality, subsampling=subsampling)
    size, bare, decoded = density.file_bytes(picture, **how)
    data = stored(picture, **how)
    assert size == len(data) and bare == len(scan_of(data)) > 0
    assert (decoded == np.array(Image.open(io.BytesIO(data)))).all()
    assert decoded.shape == picture.shape


@given(height=SIDE, width=SIDE, seed=st.integers(0, 99), quality=st.integers(0, 100))
def test_bare_bytes_of_a_webp_are_its_one_chunk(height, width, seed, quality):
    picture = photo(height, width, seed)
    how = dict(format="WEBP", quality=quality, method=6)
    size, bare, decoded = density.file_bytes(picture, **how)
    data = stored(picture, **how)
    assert size == len(data) and data[:4] + data[8:16] == b"RIFFWEBPVP8 "
    chunk = int.from_bytes(data[16:20], "little")
    assert bare == chunk + chunk % 2                       # chunks end at an even byte
    assert (decoded == np.array(Image.open(io.BytesIO(data)))).all()


def test_a_codecs_point_is_the_mean_over_the_pictures():
    images = np.stack([photo(16, 16, seed) for seed in range(3)])
    how, found = dict(format="JPEG", quality=30, subsampling=0), []
    for image in images:
        data = stored(image, **how)
        off = np.array(Image.open(io.BytesIO(data))).astype(float) - image
        found.append((10 * math.log10(255 ** 2 / (off ** 2).mean()), len(data), len(scan_of(data))))
    assert density.codec_curve(images, **how) == pytest.approx(np.mean(found, 0), rel=1e-5)


# -- Curves of size and quality --------------------------------------------------------------------

POINTS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12)


@few(max_examples=200)
@given(points=POINTS)
def test_best_drops_what_a_smaller_one_equals_and_nothing_else(points):
    kept = density.best(iter(points))
    assert kept == sorted(set(kept)) and set(kept) <= set(points)
    for size, db in set(points):
        beaten = any(other < size and value >= db for other, value in points)
        equalled = any(other <= size and value >= db for other, value in set(points) - {(size, db)})
        if (size, db) in kept:
            assert not beaten
        else:
            assert equalled
    assert [db for _, db in kept] == sorted({db for _, db in kept}), "a curve that rises"


def test_best_of_a_hand_worked_case():
    points = [(30, 5.0), (10, 1.0), (20, 4.0), (25, 4.0), (15, 0.5), (40, 5.5)]
    assert density.best(points) == [(10, 1.0), (20, 4.0), (30, 5.0), (40, 5.5)]


@given(points=POINTS, size=st.floats(0, 10))
def test_at_size_is_on_the_line_between_neighbours_and_nan_outside(points, size):
    curve = sorted(dict(points).items())                   # no size twice
    found = density.at_size(curve, size)
    for (low, a), (high, b) in zip(curve, curve[1:]):
        if low <= size <= high:
            assert found == pytest.approx(a + (b - a) * (size - low) / (high - low), abs=1e-9)
    assert math.isnan(found) == (not curve[0][0] <= size <= curve[-1][0])


def charted(studio, chosen, nats, after, curve=None):
    """rate_distortion(): what it prints, and the series of its chart. curve: quality -> a point, in
    place of the real codecs."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        if curve:
            patch.setattr(density, "codec_curve", lambda images, **how: curve(how))
        patch.setattr(plots, "save_curve", lambda path, series, **_: seen.update(series))
        out = printed(density.rate_distortion, studio, chosen, nats, after)
    return out, seen


@given(V=st.sampled_from([2, 3, 16, 17, 4096, 5000]), classes=st.sampled_from([1, 2, 3, 1000]),
       scales=st.lists(st.integers(1, 6), min_size=1, max_size=4), count=st.integers(1, 4),
       seed=st.integers(0, 99))
def test_bytes_of_the_two_codes_equal_the_slow_ones(V, classes, scales, count, seed):
    """Fixed length: whole bits for each token. Ideal: -log2 p, and the class must be told too."""
    nats = -20 * torch.rand(count, len(scales), generator=torch.Generator().manual_seed(seed))
    after = 10 + 10 * torch.rand(nats.shape, generator=torch.Generator().manual_seed(seed + 1))
    studio = make_studio(scales, V, names=["x"] * classes)
    out, series = charted(studio, torch.zeros(count, 3, 4, 4), nats, after,
                          lambda how: (how["quality"], 10 * how["quality"], how["quality"]))
    bits, each = 0, 0
    while 2 ** each < V:                                   # the fewest bits that tell V codes apart
        each += 1
    told = math.log2(classes)
    for k, side in enumerate(scales):
        bits += side * side * each
        told += sum(float(row[k]) for row in nats) / count / -BIT
        db = sum(float(row[k]) for row in after) / count
        fixed, ideal = series["fixed length"][k], series["tokens, ideal code"][k]
        assert fixed == pytest.approx((bits / 8, db)) and ideal == pytest.approx((told / 8, db))
        line = [x for x in out.splitlines() if x.startswith(f"    {side}x{side} ")]
        assert any(shows(a, bits / 8) and shows(b, told / 8) and shows(c, db)
                   for a, b, c in (x.split()[1:4] for x in line))


def test_codecs_are_read_off_at_the_size_of_the_ideal_code_and_the_best_ones_counted():
    """A made-up codec: quality q makes a file of 10 q bytes, q of them bare, of q/2 dB; WebP is
    twice as large. The ideal code: 30 bits and 1 for the class, then 64 more: 11.9 bytes."""
    def curve(how):
        q, times = how["quality"], 2 if how["format"] == "WEBP" else 1
        worse = how.get("subsampling", 0)                  # 4:2:0 is never better, so never taken
        return q / 2 - worse / 10, times * 10 * q + worse, times * q + worse / 10
    nats, after = -BIT * torch.tensor([[30.0, 64]]), torch.tensor([[5.0, 8.0]])
    out, series = charted(make_studio(), torch.zeros(1, 3, 4, 4), nats, after, curve)
    assert rows_of_table(out)["1x1"] == ["0.5", "3.9", "5.0", "-", "1.9", "1.0"]
    assert rows_of_table(out)["2x2"] == ["2.5", "11.9", "8.0", "0.6", "5.9", "3.0"]
    for words in ("JPEG: from 10 bytes (0.5 dB) on; as good as all scales from 160 bytes on",
                  "JPEG, no headers: from 1 bytes (0.5 dB) on; 1.2 dB at 2 bytes; as good",
                  "scales from 16 bytes on",
                  "WebP, no container: from 2 bytes (0.5 dB) on; 0.6 dB at 2 bytes; as good",
                  "scales from 32 bytes on"):
        assert words in out
    assert series["JPEG, no headers"] == [(1, 0.5), (3, 1.5), (6, 3.0), (10, 5.0)], "below 6 x 2.5"
    out, _ = charted(make_studio(), torch.zeros(1, 3, 4, 4), nats, after + 99, curve)
    assert out.count("never as good as all scales") == 3


def test_of_points_of_one_size_the_best_counts():
    assert density.best([(10, 0.3), (10, 0.5), (20, 1.0)]) == [(10, 0.5), (20, 1.0)]


def test_the_codecs_get_the_pictures_as_eight_bits():
    pictures_in = torch.linspace(-1, 1, 2 * 3 * 16).view(2, 3, 4, 4)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(density, "codec_curve",
                      lambda images, **how: seen.append((images, how)) or (1.0, 1, 1))
        patch.setattr(plots, "save_curve", lambda *args, **how: None)
        printed(density.rate_distortion, make_studio(), pictures_in, -torch.ones(2, 2),
                torch.ones(2, 2))
    assert {how["format"] for _, how in seen} == {"JPEG", "WEBP"}
    for images, _ in seen:
        assert images.dtype == np.uint8 and images.shape == (2, 4, 4, 3)
        assert (images == ((pictures_in + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()).all()


# -- The whole way, on a trained run ---------------------------------------------------------------

@torch.no_grad()
def slow_nats(tokenizer, var, picture, label):
    """ln p of the tokens of one picture, scale by scale, token by token: every scale runs the whole
    masked model over what is known so far, the rest filled with token 0."""
    tokens, begin, nats = tokenizer.image_to_tokens(picture[None]), 0, []
    for k, side in enumerate(tokenizer.scales):
        known = [t if i < k else torch.zeros_like(t) for i, t in enumerate(tokens)]
        logits = var(torch.tensor([label]), tokenizer.teacher_inputs(known))[0]
        total = 0.0
        for n in range(side * side):
            row = logits[begin + n].double()
            total += float(row[tokens[k][0, n]]) - math.log(sum(math.exp(x) for x in row.tolist()))
        nats.append(total)
        begin += side * side
    return nats


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The tiny run, but with a held-out part of 4 + 3 + 2 pictures: .folder, .images (N, 3, 16, 16)
    in [-1, 1], .labels, .nats (N, 4, 3), the slow ones; the last class is "none"."""
    root = tmp_path_factory.mktemp("weighed")
    drawn = iter(shapes.draw(range(12), split="test", size=16)[0])
    for split, counts in (("train", (1, 1, 1)), ("test", (4, 3, 2))):
        for name, count in zip(NAMES, counts):
            (root / "pictures" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(next(drawn)).save(root / "pictures" / split / name / f"{i}.png")
    (root / "run").mkdir()
    for part in ("tokenizer.pt", "transformer.pt"):        # as light as can be: read many times
        state = torch.load(tiny.folder / part, weights_only=True)
        torch.save({**state, "optimizers": None, "dataset": str(root / "pictures")},
                   root / "run" / part)
    images, labels, _ = folder.load("test", data_dir=root / "pictures", size=16)
    images = batches.to_float(torch.from_numpy(np.stack(list(images))))
    tokenizer, _ = m5.load_tokenizer(root / "run" / "tokenizer.pt")
    var, _ = m5.load_transformer(root / "run" / "transformer.pt")
    nats = [[slow_nats(tokenizer, var, image, c) for c in range(4)] for image in images]
    return SimpleNamespace(folder=root / "run", images=images, labels=labels.tolist(),
                           nats=torch.tensor(nats), root=root, tokenizer=tokenizer, var=var)


@pytest.fixture
def weigh(cli, run, tmp_path):
    """weigh(*options): --task density, which must work. -> what it printed"""
    def call(*options):
        result = cli(SCRIPT, "--run", run.folder, "--device", "cpu", "--task", "density", "--out",
                     tmp_path / "made", *options)
        assert result.status == 0, result.err
        return result.out
    return call


def check_bits(out, run, rows, labels):
    """The table of bits is that of these pictures, as these classes."""
    table = rows_of_table(out)
    for name, which in (("bits, class known", labels), ("bits, no class", [3] * len(rows))):
        bits = [sum(float(run.nats[row, c, k]) for row, c in zip(rows, which)) / len(rows) / -BIT
                for k in range(3)]
        assert all(map(shows, table[name], [*bits, sum(bits)])), (name, table[name], bits)
    assert re.search(rf"^{len(rows)} .*without a model every token costs 4 bits$", out, re.M)
    return table


def test_density_of_a_run_equals_the_slow_loops(weigh, run, tmp_path):
    out = weigh()
    table = check_bits(out, run, range(9), run.labels)
    known = run.nats[range(9), run.labels].double()
    share, each = accuracies("\n".join(out[out.index("Bayes' rule"):].splitlines()[:2]))
    for k in range(3):
        right = run.nats[:, :3, :k + 1].double().sum(2).argmax(1).tolist()
        assert each[k] == pytest.approx(np.mean([a == b for a, b in zip(right, run.labels)]),
                                        abs=6e-4)
    assert share == [each[-1], pytest.approx(1 / 3, abs=6e-4)]
    curve = [line.split() for line in out.splitlines() if re.match(r"    \dx\d .*\d\.\d", line)]
    psnr = []
    for f_hat in run.tokenizer.pyramid(run.tokenizer.image_to_tokens(run.images)):
        with torch.no_grad():
            off = (run.tokenizer.decode(f_hat).clamp(-1, 1) - run.images).double() / 2
        psnr.append(float(-10 * off.square().mean((1, 2, 3)).log10().mean()))
    told = math.log2(3)
    for k, (row, tokens) in enumerate(zip(curve, (1, 5, 21), strict=True)):
        told -= float(known[:, k].mean()) / BIT
        assert shows(row[1], tokens * 4 / 8) and shows(row[2], told / 8) and shows(row[3], psnr[k])
    assert table["tokens"] == ["1", "4", "16", "21"]
    with Image.open(tmp_path / "made" / "rate_distortion.png") as chart:
        chart.load()
        assert chart.size == (900, 480) and len(chart.getcolors(10 ** 6)) > 5
    assert {p.name for p in (tmp_path / "made").iterdir()} == {"rate_distortion.png"}


def test_n_and_classes_choose_the_pictures_and_labels_go_with_them(weigh, run):
    rows = batches.rows_of(9, 4).tolist()
    check_bits(weigh("--n", 4), run, rows, [run.labels[row] for row in rows])
    check_bits(weigh("--n", 99), run, range(9), run.labels)
    out = weigh("--classes", "cat", "bee")                 # rows 4 to 6 are bees, 7 and 8 cats
    check_bits(out, run, range(4, 9), run.labels[4:])
    nats = run.nats[4:, 1:3].sum(2)
    right = (nats.argmax(1) + 1 == torch.tensor(run.labels[4:])).double().mean()
    assert f"for {right:.1%} of 5 pictures (by chance 50.0%)" in out
    assert "Bayes" not in weigh("--classes", "cat")


def test_many_passes_say_the_same_as_one(weigh, monkeypatch):
    whole = weigh()
    sizes, encode = [], m6.vqvae.MultiScaleVQVAE.image_to_tokens
    monkeypatch.setattr(m6.vqvae.MultiScaleVQVAE, "image_to_tokens",
                        lambda self, image: sizes.append(len(image)) or encode(self, image))
    monkeypatch.setattr(density, "per_pass", lambda side: 2)
    assert weigh() == whole and sizes == [2, 2, 2, 2, 1]


def test_one_picture_is_named_by_bayes_rule(weigh, run):
    """p(class | tokens) = p(tokens | class) / sum over the classes, all alike before."""
    path = run.root / "pictures" / "test" / "bee" / "1.png"
    image = batches.to_float(torch.from_numpy(np.array(Image.open(path))[None]))[0]
    every = [slow_nats(run.tokenizer, run.var, image, c) for c in range(4)]
    for among in ((0, 1, 2), (2, 0)):
        total = [sum(every[c]) for c in among]
        p = [math.exp(x - max(total)) for x in total]
        named = sorted(((x / sum(p), NAMES[c]) for x, c in zip(p, among)), reverse=True)
        options = [] if len(among) == 3 else ["--classes", *map(str, among)]
        out = weigh("--image", path, *options)
        line = [x for x in out.splitlines() if x.startswith("p(class | tokens)")]
        found = re.findall(r"(\w+) ([\d.]+)%", line[0])
        assert [name for name, _ in found] == [name for _, name in named]
        assert all(shows(x, 100 * share) for (_, x), (share, _) in zip(found, named))
        likeliest = every[among[total.index(max(total))]]
        assert shows(rows_of_table(out)["bits, class known"][-1], sum(likeliest) / -BIT)
        assert shows(rows_of_table(out)["bits, no class"][-1], sum(every[3]) / -BIT)
        assert "Bayes' rule" not in out, "nobody has said which class would be right"


def test_without_pictures_to_weigh_it_is_one_line(refused, run, tmp_path):
    room = object.__new__(studio.Studio)                           # released models know none
    room.dataset, room.names, room.classes, room.var = None, ["a"], [0], None
    room.args = SimpleNamespace(image=None, classes=None, n=None, data_dir="")
    with pytest.raises(BadInput, match="--data-dir") as error:
        density.density(room)
    assert "\n" not in str(error.value)
    shutil.copytree(run.folder, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "transformer.pt", weights_only=True)

    def weigh(dataset, *options):
        torch.save({**state, "dataset": str(dataset)}, tmp_path / "run" / "transformer.pt")
        return refused(SCRIPT, "--run", tmp_path / "run", "--device", "cpu", "--task", "density",
                       *options)
    assert "gone" in weigh(tmp_path / "gone")
    shutil.copytree(run.root / "pictures", tmp_path / "few")
    shutil.rmtree(tmp_path / "few" / "test" / "bee")
    assert "classes" in weigh(tmp_path / "few", "--classes", "bee")
