"""What looks at a model: figures, the tokenizer's health, the judge, bits and Bayes' rule."""
import math
import re
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import printed, random_models, seeded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import shapes
from data.registry import Dataset
from report import density, health, judge, plots

m2, m6 = import_module("02_multiscale_vqvae"), import_module("06_sample_and_edit")


# -- Figures -------------------------------------------------------------------------------

@given(count=st.integers(1, 7), columns=st.integers(1, 4), side=st.integers(1, 5),
       scale=st.integers(1, 3))
def test_every_pixel_of_a_grid_lands_where_it_should(tmp_path_factory, count, columns, side,
                                                     scale):
    images = np.random.default_rng(count).integers(0, 255, (count, side, 3, 3), np.uint8)
    path = tmp_path_factory.mktemp("grid") / "new" / "grid.png"
    plots.save_grid(path, images, columns, scale=scale)
    high, wide, rows = side * scale + 2, 3 * scale + 2, math.ceil(count / columns)
    expected = np.full((2 + rows * high, 2 + columns * wide, 3), 255, np.uint8)
    for i, y, x in np.ndindex(count, side * scale, 3 * scale):
        expected[2 + i // columns * high + y, 2 + i % columns * wide + x] = (
            images[i, y // scale, x // scale])
    assert (np.array(Image.open(path)) == expected).all()


def test_labels_and_legends_are_never_cut_off(tmp_path):
    path, text = tmp_path / "g.png", "a long label, with more words\nthan images"
    plots.save_grid(path, np.full((2, 4, 4, 3), 255, np.uint8), 2, scale=1, row_labels=[text],
                    column_labels=[text, "short"], footer=plots.legend(text))
    sheet = np.array(Image.open(path))
    edge = np.concatenate([sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]])
    assert sheet.min() < 100 and edge.min() == 255         # there is ink, none on the border
    with pytest.raises(ValueError):
        plots.save_grid(path, torch.zeros(0, 3, 8, 8), 1)


def test_names_of_classes_are_short_and_drawn_by_a_font_that_has_them_or_are_numbers():
    assert plots.class_label("cat", 3) == "cat"
    assert len(plots.class_label("black-and-gold garden spider", 72)) <= 22
    assert plots.class_label("\U0010fffd", 3) == "class 3", "no font has this"
    for name in ("über", "猫", "العربية", "🚗"):
        label = plots.class_label(name, 3)
        assert label in (name, "class 3")
        missing = plots.font_for(label).getmask("\U0010ffff")
        assert all(bytes(plots.font_for(label).getmask(c)) != bytes(missing)
                   for c in label.replace(" ", ""))


def test_colours_rise_and_clip_and_those_of_tokens_are_far_apart():
    rising = plots.heat_maps(torch.linspace(0, 1, 64).view(1, 1, 64), 0, 1)[0, :, 0]
    assert (torch.tensor([0.299, 0.587, 0.114]) @ rising).diff().min() > 0
    ends = plots.heat_map(np.array([[-5.0, 0, 1, 9]]), low=0, high=1)[0]
    assert (ends[0] == ends[1]).all() and (ends[2] == ends[3]).all()
    colours = plots.token_colours(torch.arange(64)[None], 8, 64)
    assert 0 <= colours.min() and colours.max() <= 1
    assert torch.pdist(colours[0].reshape(3, -1).T).min() > 0.08
    images = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert plots.to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("log, curve", [
    ("", lambda x: x), ("x", lambda x: 5 + math.log(x)), ("y", lambda x: math.exp(x / 20)),
    ("xy", lambda x: x ** 3)])
def test_a_chart_draws_what_its_axes_promise_as_a_straight_line(tmp_path, log, curve):
    points = [*((x, curve(x)) for x in range(1, 100)), (3, math.nan), (math.inf, 1)]
    plots.save_curve(tmp_path / "c.png", {"": points, "no points": []}, log=log)
    chart = (np.array(Image.open(tmp_path / "c.png")) == plots.LINES[0]).all(2)
    heights = np.array([np.flatnonzero(column).mean() for column in chart.T if column.any()])
    x = np.arange(len(heights))
    assert len(heights) > 100 and heights[-1] < heights[0] - 100
    assert abs(heights - np.polyval(np.polyfit(x, heights, 1), x)).max() < 3
    with pytest.raises(ValueError):
        plots.save_curve(tmp_path / "none.png", {"a": [(0, math.inf)]}, log=log)


# -- The tokenizer's health ----------------------------------------------------------------

def slow_examine(model, images):
    """Image by image, with what the model offers in public."""
    K, V = model.K, model.config.vocab_size
    tokens, missing, energy, db = [[] for _ in range(K)], np.zeros(K), 0, np.zeros(K)
    for image in images[:, None]:
        f = model.encode(image)
        found = model.quantize(f)
        energy += float((f ** 2).sum())
        for k, f_hat in enumerate(model.pyramid(found)):
            tokens[k] += found[k][0].tolist()
            missing[k] += float(((f - f_hat) ** 2).sum())
            error = (model.decode(f_hat).clamp(-1, 1) - image) / 2
            db[k] -= 10 * math.log10(float((error ** 2).mean())) / len(images)
    used, perplexity = [], []
    for codes in [*tokens, sum(tokens, [])]:               # every scale, then all together
        shares = [codes.count(code) / len(codes) for code in set(codes)]
        used.append(len(shares) / V)
        perplexity.append(math.prod(p ** -p for p in shares))
    return dict(used=used[:-1], perplexity=perplexity[:-1], used_overall=used[-1],
                perplexity_overall=perplexity[-1], left=missing / energy, psnr_after=db,
                psnr=db[-1])


def test_examine_equals_a_slow_loop_however_the_images_are_cut():
    model, _ = random_models()
    images = torch.rand(11, 3, 16, 16, generator=seeded()) * torch.linspace(0.1, 1.9, 11).view(
        11, 1, 1, 1) - 1
    slow = slow_examine(model, images)
    for cut in (4, [1, 8, 2]):
        fast = health.examine(model, images.split(cut), torch.no_grad)
        for key, value in slow.items():
            assert fast[key] == pytest.approx(value, rel=1e-4), (key, cut)


def warned(used=(0.02, 0.1, 0.19, 0.2, 0.9), left=(0.9, 0.7, 0.709, 0.3, 0.1), seen=100,
           residual=True):
    config = SimpleNamespace(scales=(1, 2, 4, 5, 8), vocab_size=64, residual=residual)
    return health.warnings(config, dict(used=used, left=left), seen)


def test_a_scale_that_collapsed_or_does_harm_is_named_with_options_that_exist(cli):
    assert warned() == [], "up to 4x4, few codes are normal"
    assert warned(used=[0.01] * 5, seen=3) == [], "64 codes were not seen four times over"
    assert warned(left=[0.1, 0.9, 0.2, 0.9, 0.2], residual=False) == []
    (few,) = warned(used=[0.02, 0.1, 0.19, 0.2, 0.19], seen=4)
    (worse,) = warned(left=[0.9, 0.7, 0.3, 0.312, 0.1])
    assert "8x8" in few and "19% of 64 codes" in few
    assert "5x5" in worse and "30% -> 31%" in worse
    options = set(re.findall(r"--[a-z-]+[a-z]", f"{few} {worse}"))
    assert options <= set(re.findall(r"--[a-z-]+[a-z]", cli("05_train.py", "--help").out))


# -- The judge -----------------------------------------------------------------------------

def test_frechet_distance_matches_the_closed_form():
    raw = torch.randn(400, 3, generator=seeded(), dtype=torch.float64)
    raw -= raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T))).T    # covariance 1
    wide, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.0, -1.0])
    # Diagonal covariances: squared differences of means and of standard deviations, added up.
    assert judge.frechet_distance(white, white * wide + shift) == pytest.approx(6.25, rel=1e-9)
    # Covariances that do not commute: the plain formula with the eigenvalues of the product.
    a, b = white @ torch.randn(3, 3, generator=seeded(1), dtype=torch.float64), white * wide
    product = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).real.sqrt().sum()
    expected = torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * product
    assert judge.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)
    with pytest.raises(ValueError):
        judge.frechet_distance(a[:1], b)


@given(seed=st.integers(0, 99), k=st.integers(1, 3))
def test_precision_and_recall_match_the_slow_loop(seed, k):
    def share_inside(points, members):                     # the definition, one pair at a time
        return sum(any((point - member).norm() <= sorted((member - x).norm() for x in members)[k]
                       for member in members) for point in points) / len(points)
    real, fake = torch.randn(14, 2, generator=seeded(seed)).double().split([8, 6])
    assert judge.precision_recall(real, fake + 0.5, k) == (
        share_inside(fake + 0.5, real), share_inside(real, fake + 0.5))
    # Copies of one real image look real and cover next to nothing: that is mode collapse.
    assert judge.precision_recall(real, real[:1].repeat(20, 1), k) == (1, 1 / 8)
    with pytest.raises(ValueError):
        judge.precision_recall(real, real[:k])


def test_a_judge_learns_is_kept_and_leaves_the_callers_random_numbers(tmp_path, monkeypatch):
    images, labels, _ = shapes.load("train", data_dir=None, size=16)
    images, labels = images[:400], labels[:400] % 2
    images[labels == 1] //= 2                              # class 1 is dark
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judge, "dataset_named", lambda name: Dataset(None, 12, mirrored=True))
    before, networks = torch.random.get_rng_state(), []
    for damage in (False, False, True):
        for path in tmp_path.glob("out/*") if damage else ():
            path.write_bytes(path.read_bytes()[:999])
        networks.append(judge.judge_of("some/shapes", images, labels, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    first, *others = (network.head.weight for network in networks)
    assert all(torch.equal(first, other) for other in others)
    _, logits = judge.extract(networks[0], judge.batches_of(images, range(400)))
    assert judge.accuracy(logits, labels) > 0.8


def test_the_table_of_evaluate_has_the_figures_of_its_images(tmp_path, monkeypatch):
    tokenizer, _ = random_models()
    monkeypatch.chdir(tmp_path)
    splits = {split: shapes.draw(range(24), split=split, size=16) for split in ("train", "test")}
    torch.manual_seed(0)
    network, samples = judge.Judge(10, 16).eval(), torch.rand(20, 3, 16, 16)
    monkeypatch.setattr(judge, "judge_of", lambda *_: network)
    names = shapes.load("test", data_dir=None, size=16)[2]
    monkeypatch.setattr(judge, "load_splits", lambda *_: (None, splits, names))
    drawn = []
    out = printed(judge.evaluate, "shapes", "", names, tokenizer,
                  lambda labels: drawn.append(labels) or samples, 20)
    rows = re.findall(r"^(\S.*?)  +([\d.]+)% +([\d.]+) +([\d.]+) +([\d.]+)$", out, re.M)
    assert [row[0] for row in rows] == ["held-out images", "reconstructions", "samples"]
    known = judge.extract(network, judge.batches_of(splits["train"][0], judge.rows_of(24, 20)))[0]
    features, logits = judge.extract(network, [samples])
    assert [float(x) for x in rows[2][1:]] == pytest.approx(
        [100 * judge.accuracy(logits, drawn[0]), judge.frechet_distance(known, features),
         *judge.precision_recall(known, features)], abs=0.06)
    assert drawn[0].tolist() == [*range(10)] * 2, "the classes take turns"


# -- Bits and Bayes' rule ------------------------------------------------------------------

def test_bits_and_bayes_of_a_case_worked_by_hand():
    """Two images of classes 7 and 4, scales of 1 and 4 tokens. Class 7: 2 + 6 and 4 + 10 bits,
    class 4: 3 + 4 and 1 + 7 bits, no class: 5 + 8 bits. So scale 1x1 finds the right class both
    times, and both scales together do so for the second image alone."""
    bits = {7: [[2.0, 6], [4, 10]], 4: [[3.0, 4], [1, 7]], 9: [[5.0, 8], [5, 8]]}
    tokenizer = SimpleNamespace(
        scales=(1, 2), config=SimpleNamespace(vocab_size=16), image_to_tokens=lambda image: None,
        parameters=lambda: iter([torch.zeros(1)]))

    def log_likelihood(tokens, labels):
        return -torch.tensor(bits[int(labels[0])]) * math.log(2)
    show = partial(density.density, tokenizer, log_likelihood)
    out = printed(show, torch.zeros(2, 3, 4, 4), torch.tensor([7, 4]), {7: "x", 4: "y"}, 9)
    for row in (r"given no class +5\.0 +8\.0 +13\.0", r"given the class +1\.5 +6\.5 +8\.0",
                r"per token +1\.50 +1\.6[23] +1\.60", r"per pixel +0\.094 +0\.406 +0\.500",
                r"1x1: 100\.0%", r"2x2: 50\.0%", r"costs log2 V, 4 bits"):
        assert re.search(row, out), (row, out)
    bits = {c: rows[:1] for c, rows in bits.items()}       # 8 against 7 bits: 1 to 2
    out = printed(show, torch.zeros(1, 3, 4, 4), None, {7: "x", 4: "y"}, 9)
    assert "p(class | tokens): y 66.7%, x 33.3%" in out


def test_density_and_evaluate_run_on_the_tiny_run(cli, tiny):
    """Only 3 of its images are held out, so evaluate has too few."""
    options = ("--run", tiny.folder, "--device", "cpu", "--out", "made")
    assert "3 images" in cli("06_sample_and_edit.py", *options, "--task", "density").out
    assert "4 held out" in cli("06_sample_and_edit.py", *options, "--task", "evaluate").err
