"""Reports on a model: figures, the tokenizer's health, the judge, bits, Bayes' rule."""
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_models, seeded
from hypothesis import given, strategies as st
from PIL import Image

from data import shapes
from data.registry import Dataset
from report import gallery, health, judge, plots


# -- Figures -------------------------------------------------------------------------------

@given(count=st.integers(1, 3), columns=st.integers(1, 4), scale=st.integers(1, 3))
def test_every_pixel_of_a_grid_lands_in_its_place(tmp_path_factory, count, columns, scale):
    """To the right of the labels. 24 pixels are higher than a label."""
    images = torch.randint(256, (count, columns, 3, 24, 3), generator=seeded(count))
    path = tmp_path_factory.mktemp("grid") / "new" / "grid.png"
    plots.save_grid(path, dict(zip("abc", images / 255)), scale=scale)
    high, wide = 24 * scale + 2, 3 * scale + 2
    expected = np.full((2 + count * high, columns * wide, 3), 255, np.uint8)
    for row, column, y, x in np.ndindex(count, columns, 24 * scale, 3 * scale):
        expected[2 + row * high + y, column * wide + x] = (
            images[row, column, :, y // scale, x // scale])
    assert (np.array(Image.open(path))[:, -columns * wide:] == expected).all()


@pytest.mark.parametrize("name", ["über", "猫", "\U0010fffd"])      # no font has the last
def test_names_of_classes_are_in_a_font_that_has_them_or_are_numbers(name):
    label = plots.class_label(name, 3)
    assert label == "class 3" if name == "\U0010fffd" else label in (name, "class 3")
    font = plots.font_for(label)
    missing = bytes(font.getmask("\U0010ffff"))
    assert all(bytes(font.getmask(c)) != missing for c in label if c != " ")


# -- The tokenizer's health ----------------------------------------------------------------

def test_examine_equals_a_slow_loop_however_the_images_are_cut():
    model, _ = random_models()
    brightness = torch.linspace(0.1, 1.9, 11).view(11, 1, 1, 1)
    images = torch.rand(11, 3, 16, 16, generator=seeded()) * brightness - 1
    fast = health.examine(model, images.split([1, 8, 2]), torch.no_grad)
    tokens, db = [[] for _ in range(model.K)], np.zeros(model.K)
    for image in images[:, None]:
        found = model.image_to_tokens(image)
        for k, f_hat in enumerate(model.pyramid(found)):
            tokens[k] += found[k][0].tolist()
            error = (model.decode(f_hat).clamp(-1, 1) - image) / 2
            db[k] -= 10 * math.log10(float((error ** 2).mean())) / len(images)
    used, perplexity = [], []
    for codes in [*tokens, sum(tokens, [])]:               # every scale, then all together
        shares = [codes.count(code) / len(codes) for code in set(codes)]
        used.append(len(shares) / model.config.vocab_size)
        perplexity.append(math.prod(p ** -p for p in shares))
    assert [*fast["used"], fast["used_overall"]] == pytest.approx(used)
    assert [*fast["perplexity"], fast["perplexity_overall"]] == pytest.approx(perplexity)
    assert fast["psnr_after"] == pytest.approx(db, rel=1e-4)


def test_a_collapse_of_the_last_scale_is_reported(tmp_path):
    model, _ = random_models()
    model.quantizer.codebook[1:] = 1e6                     # one code is always the nearest
    images = torch.from_numpy(shapes.draw(range(4), size=16)[0])
    how = torch.device("cpu"), torch.no_grad, tmp_path / "r.png"
    few, enough = (health.check_up(model, images[:count], *how)[0] for count in (3, 4))
    assert "warning" not in few, "16 codes were not seen four times over"
    assert "the last scale has collapsed, 6% of 16 codes" in enough


# -- The judge -----------------------------------------------------------------------------

def test_frechet_distance_matches_the_plain_formula():
    """Its square root of a product of covariances that do not commute, by eigenvalues."""
    a = torch.randn(400, 3, generator=seeded(), dtype=torch.float64)
    mixing = torch.randn(3, 3, generator=seeded(1), dtype=torch.float64)
    b = a @ mixing + torch.tensor([2, 0, 1])
    A, B = torch.cov(a.T), torch.cov(b.T)
    roots = torch.linalg.eigvals(A @ B).real.sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * roots
    assert judge.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)


@given(seed=st.integers(0, 99), k=st.integers(1, 3))
def test_precision_and_recall_match_the_slow_loop(seed, k):
    def share_inside(points, members):                     # the definition
        radii = torch.stack([(members - x).norm(dim=1).sort().values[k] for x in members])
        inside = [((members - x).norm(dim=1) <= radii).any() for x in points]
        return sum(inside) / len(points)
    real, fake = torch.randn(14, 2, generator=seeded(seed)).double().split([8, 6])
    assert judge.precision_recall(real, fake + 0.5, k) == (
        share_inside(fake + 0.5, real), share_inside(real, fake + 0.5))
    # Copies of one real image look real and cover next to nothing: that is mode collapse.
    assert judge.precision_recall(real, real[:1].repeat(20, 1), k) == (1, 1 / 8)


def test_a_judge_learns_and_is_kept_and_evaluate_prints_its_measures(
        tmp_path, monkeypatch, capsys):
    """Two classes; three images of ten are dark. The "samples" are held-out images."""
    images, labels = shapes.draw(range(500), size=16)
    labels = (labels < 3).astype(np.int64)
    images[labels == 1] //= 3
    splits = {"train": (images[:400], labels[:400]), "test": (images[400:], labels[400:])}
    samples = judge.to_float(torch.from_numpy(images[400:])) / 2 + 0.5
    tokenizer, _ = random_models()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judge, "dataset_named", lambda _: Dataset(None, 25, mirrored=True))
    monkeypatch.setattr(judge, "load_splits", lambda *_: (None, splits, ["pale", "dark"]))
    args = SimpleNamespace(dataset="any", data_dir="", side=16, names=["pale", "dark"],
                           n=100, device=torch.device("cpu"))
    meant = []
    model = SimpleNamespace(tokenizer=tokenizer,
                            sample=lambda labels: meant.append(labels) or samples)
    judge.evaluate(args, model)
    out = capsys.readouterr().out
    assert torch.bincount(meant[0]).tolist() == [70, 30], "in the shares of the real images"
    monkeypatch.setattr(judge, "varied", None)             # it was kept in out/
    network = judge.judge_of("any", *splits["train"], 2)
    known, _ = judge.extract(network, judge.batches_of(images, judge.rows_of(400, 100)))
    features, logits = judge.extract(network, [samples])
    row = re.search(r"samples +([\d.]+)% +([\d.]+) +([\d.]+) +([\d.]+)$", out, re.M)
    assert judge.accuracy(logits, labels[400:]) > 0.8
    assert [float(x) for x in row.groups()] == pytest.approx(
        [100 * judge.accuracy(logits, meant[0]), judge.frechet_distance(known, features),
         *judge.precision_recall(known, features)], abs=0.06)


# -- Bits and Bayes' rule ------------------------------------------------------------------

def test_bits_and_bayes_of_a_case_worked_by_hand(monkeypatch, capsys):
    """Two images of classes 7 and 4, scales of 1 and 4 tokens. Scale 1x1 finds the class of
    both, and both scales together that of the first alone."""
    bits = {7: [[2.0, 6], [4, 3]], 4: [[5.0, 4], [1, 7]], 9: [[5.0, 8], [5, 8]]}
    tokenizer = SimpleNamespace(scales=(1, 2), config=SimpleNamespace(vocab_size=16),
                                image_to_tokens=lambda image: None)
    model = SimpleNamespace(tokenizer=tokenizer, log_likelihood=lambda tokens, labels: (
        -torch.tensor(bits[labels[0]]) * math.log(2)))
    monkeypatch.setattr(gallery, "images_to_edit", lambda args, count: (
        torch.zeros(2, 3, 4, 4), torch.tensor([7, 4])))
    gallery.show_density(SimpleNamespace(image=None, n=2, labels={7: "x", 4: "y"}, side=4,
                                         names=9 * ["z"], device="cpu"), model)
    out = capsys.readouterr().out
    for row in (r"given no class +5\.0 +8\.0 +13\.0", r"given the class +1\.5 +6\.5 +8\.0",
                r"per token +1\.50 +1\.6[23] +1\.60", r"class found so far +100% +50%",
                r"costs log2 V, 4 bits", r"by chance: 50%"):
        assert re.search(row, out), (row, out)


def test_density_and_evaluate_run_on_the_tiny_run(cli, tiny):
    """Only 3 of its images are held out, so evaluate has too few."""
    options = ("--run", tiny.folder, "--device", "cpu", "--out", "made")
    assert "3 images" in cli("06_sample_and_edit.py", *options, "--task", "density").out
    assert "held-out" in cli("06_sample_and_edit.py", *options, "--task", "evaluate").err
