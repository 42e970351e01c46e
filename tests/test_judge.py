"""The judge: what it learns, how it reads images, and what is measured with its features."""
import re

import numpy as np
import pytest
import torch
from conftest import printed, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import get_worker_info

from data import shapes
from data.registry import Dataset
from engine import BadInput
from report import command_line, gallery, judge


def untrained(classes=3, size=16):
    """A judge that has learnt nothing tells images apart all the same; the last norm is turned up,
    so that its distances have digits before the point."""
    torch.manual_seed(0)
    network = judge.Judge(classes, size).eval()
    with torch.no_grad():
        network.body[-2].weight.mul_(300)
        network.head.weight.mul_(10)
    return network


class Files:
    """Images as a folder offers them. With `mark`, their first pixel is white in a worker."""
    names = b""

    def __init__(self, images, mark=False):
        self.images, self.mark = images, mark

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]

    def crops(self, i, seeds):
        crops = np.stack([self.images[i]] * len(seeds))
        crops[:, 0, 0] = 255 if self.mark and get_worker_info() else crops[:, 0, 0]
        return crops

    def skipped(self):
        return 0


def test_frechet_distance_matches_the_closed_form():
    raw = torch.randn(400, 3, generator=seeded(), dtype=torch.float64)
    raw -= raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T))).T  # covariance = 1
    wide, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.0, -1.0])
    # Diagonal covariances: sum of squared differences of means and of standard deviations.
    assert judge.frechet_distance(white, white * wide + shift) == pytest.approx(6.25, rel=1e-9)
    # Covariances that do not commute, against the plain formula with the product's eigenvalues.
    a, b = white @ torch.randn(3, 3, generator=seeded(1), dtype=torch.float64), white * wide
    product = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).real.sqrt().sum()
    expected = torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * product
    assert judge.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)
    assert 0 <= judge.frechet_distance(a[:2], a[:2]) < 1e-5
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


@pytest.mark.slow
def test_the_judge_learns():
    images, labels, names = shapes.load("train", count=3_000, size=16)  # 16 pixels: for speed
    held_out, held_labels, _ = shapes.load("test", count=300, size=16)
    network = judge.train_judge(images, labels, len(names), steps=45)
    _, logits = judge.extract(network, judge.batches_of(held_out, range(300)))
    assert judge.accuracy(logits, held_labels) > 0.9


def test_half_of_the_images_are_mirrored_where_that_keeps_their_class():
    """The other changes are the same; about half of the images are mirrored, each whole."""
    images = torch.rand(40, 3, 8, 8, generator=seeded())

    def augmented(images, mirrored):
        *changes, speckle, noise, mirror = judge.random_changes(40, 8, seeded(1), mirrored)
        changes[0] = torch.zeros_like(changes[0])                        # no shift
        return judge.augment(images, (*changes, 0 * speckle, noise, mirror)), mirror[:, 0]
    plain, none = augmented(images, False)
    found, mirror = augmented(images, True)
    assert not none.any() and 10 < mirror.sum() < 30
    assert torch.equal(found[~mirror], plain[~mirror])
    assert torch.equal(found[mirror], augmented(images.flip(3), False)[0][mirror])
    images = np.zeros((4, 8, 8, 3), np.uint8)
    network = judge.train_judge(images, [0, 1, 0, 1], 2, steps=1, width=5,
                                mirrored=True, log=len)
    assert network.head.in_features == 5


def test_a_judge_is_kept_for_its_images_and_is_the_same_from_memory_and_from_files(
        tmp_path, monkeypatch):
    """It leaves the caller's random numbers alone, and a damaged file is replaced."""
    images, labels, _ = shapes.load("train", count=40, size=16)
    lines, before = [], torch.random.get_rng_state()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judge, "dataset_named", lambda name: Dataset(None, 2))

    def weights(images):
        network = judge.judge_of("some/shapes", images, labels, 10, log=lines.append)
        assert not network.training and torch.equal(before, torch.random.get_rng_state())
        return network.head.weight
    first, again, files = weights(images), weights(images), weights(Files(images))
    assert len(lines) == 2, "the second was read, not trained"
    for path in (tmp_path / "out").iterdir():
        path.write_bytes(path.read_bytes()[:999])
    repaired, other = weights(images), weights(255 - images)
    assert len(lines) == 4 and len(list((tmp_path / "out").iterdir())) == 3
    assert all(torch.equal(first, same) for same in (again, files, repaired))
    assert not torch.equal(first, other)


def test_workers_decode_image_files_and_memory_is_read_here():
    images = np.zeros((7, 16, 16, 3), np.uint8)
    read = torch.cat(list(judge.middles(Files(images, True), [[5, 2], [3]])))
    assert read.shape == (3, 16, 16, 3) and (read[:, 0, 0] == 255).all() and read.sum() == 9 * 255
    assert torch.cat(list(judge.batches_of(images, [5, 2, 3]))).sum() == 0


# -- The table -------------------------------------------------------------------------------------

@pytest.fixture
def wall(monkeypatch):
    """Keeps what would have been saved: name -> rows of images."""
    wall = {}
    monkeypatch.setattr(gallery, "save", lambda out, name, images, columns, **_: wall.update(
        {name: images.split(columns)}))
    return wall


def test_neighbours_are_those_of_the_slow_search_and_copies_are_counted(wall):
    """8 of 20 samples are nearer to training images than 1 % of 30 held-out images: than 29/100
    of the way from the nearest to the next."""
    network, floats = untrained(), judge.as_floats(torch.from_numpy(shapes.draw(range(40))[0]))
    known, shown = judge.extract(network, [floats])[0], floats[[1, 2, 4, 5, 6]] * 0.9
    axis, copied = torch.eye(known.shape[1])[:1], [3, 9, 30, 8, 7, *range(15)]
    far = torch.tensor([0.0] * 5 + [0.101] * 3 + [0.102] * 12)
    out = printed(judge.neighbours, "", network, torch.from_numpy(shapes.draw(range(40))[0]), shown,
                  known[:30] + torch.linspace(0.1, 0.245, 30)[:, None] * axis,
                  known[copied] + far[:, None] * axis)
    assert "samples are 0.10 away (median), held-out images 0.17; 40.0% of the samples" in out
    assert "nearest of 40 training images" in out
    first, by_features, by_pixels = wall["neighbours"]
    assert torch.equal(first, shown) and torch.equal(by_features, floats[copied[:5]])
    for image, found in zip(shown, by_pixels):
        apart = [float((image - other).norm()) for other in floats]
        assert torch.equal(found, floats[apart.index(min(apart))])


class Copier(torch.nn.Linear):
    """A tokenizer whose reconstructions are half as bright."""

    def image_to_tokens(self, image):
        return image

    def tokens_to_image(self, image):
        return (image - 1) / 2


def test_the_table_has_the_figures_of_three_kinds_of_images_and_keeps_no_samples(wall):
    network, n, rows = untrained(), 20, judge.rows_of(24, 20)
    real = shapes.draw(range(30), size=16)[0]
    test, labels = shapes.draw(range(24), split="test", size=16)[0], np.arange(24) % 3
    samples, meant = torch.rand(n, 3, 16, 16, generator=seeded()), np.arange(n) % 2
    out = printed(judge.evaluate, "", network, Copier(1, 1), real, test, labels,
                  iter(samples.split(5)), meant, "samples, cfg 2.5")
    table = re.findall(r"^(\S.*?)  +([\d.]+)% +([\d.]+) +([\d.]+) +([\d.]+)$", out, re.M)
    assert [row[0] for row in table][1:] == ["reconstructions", "samples, cfg 2.5"]
    held_out, labels = judge.as_floats(torch.from_numpy(test[rows])), labels[rows]
    known = judge.extract(network, judge.batches_of(real, judge.rows_of(30, n)))[0]
    for row, images, meant_ in zip(table, (held_out, held_out / 2, samples),
                                   (labels, labels, meant)):
        features, logits = judge.extract(network, [images])
        right = 100 * np.mean([int(a) == b for a, b in zip(logits.argmax(1), meant_)])
        assert [float(x) for x in row[1:3]] == pytest.approx(
            [right, judge.frechet_distance(known, features)], abs=0.06, rel=1e-3)
        assert [float(x) for x in row[3:]] == pytest.approx(
            judge.precision_recall(known, features), abs=6e-3)
    assert "20 images a row" in out
    assert torch.equal(wall["neighbours"][0], samples[:16])


def test_classes_take_turns_and_four_images_of_each_kind_are_needed():
    assert judge.labels_to_draw(1000, np.array([5, 2, 5, 2, 2]), np.zeros(9)) == [2, 5, 2, 5, 2]
    assert len(judge.labels_to_draw(7, np.zeros(40), np.zeros(30))) == 7
    for asked, real, test in ((3, 40, 40), (1000, 3, 40), (1000, 40, 3)):
        with pytest.raises(BadInput, match="4 images"):
            judge.labels_to_draw(asked, np.zeros(real), np.zeros(test))


def test_evaluate_judges_a_runs_samples_in_each_class_in_turn(cli, tiny, tmp_path, monkeypatch):
    """Only 3 of its images are held out, so those it was trained on stand in for them."""
    real, network = command_line.load_data, untrained()
    monkeypatch.setattr(command_line, "load_data", lambda name, _, *how: real(name, "train", *how))
    monkeypatch.setattr(judge, "judge_of", lambda *args, **how: network)
    result = cli("06_sample_and_edit.py", "--run", tiny.folder, "--device", "cpu", "--task",
                 "evaluate", "--n", 8, "--cfg", 2.5, "--out", tmp_path / "made")
    assert result.status == 0, result.err
    assert "8 images a row" in result.out and "held-out images of 3 classes" in result.out
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["neighbours.png"]
