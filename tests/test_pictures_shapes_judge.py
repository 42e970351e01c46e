"""The built-in pictures, the figures and the judge: what the chapters' own numbers stand on."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import shapes
from report import judge, plots

INDEX = st.integers(0, 10**6)


# Figures

def test_to_uint8_rounds_and_clips():
    images = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert plots.to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


@given(count=st.integers(1, 7), columns=st.integers(1, 4), side=st.integers(1, 5),
       scale=st.integers(1, 3), gap=st.integers(0, 3))
def test_every_pixel_of_a_grid_lands_where_it_should(tmp_path_factory, count, columns, side, scale,
                                                     gap):
    images = np.random.default_rng(count).integers(0, 255, (count, side, side, 3), np.uint8)
    path = tmp_path_factory.mktemp("grid") / "new" / "grid.png"
    plots.save_grid(path, images, columns, scale=scale, gap=gap)
    sheet, step = np.array(Image.open(path)), side * scale + gap
    expected = np.full((gap + -(-count // columns) * step, gap + columns * step, 3), 255, np.uint8)
    for i in range(count):
        for y in range(side * scale):
            for x in range(side * scale):
                expected[gap + i // columns * step + y, gap + i % columns * step + x] = (
                    images[i, y // scale, x // scale])
    assert (sheet == expected).all()


def test_grid_scales_small_pictures_and_leaves_large_ones(tmp_path):
    for side, shown in [(8, 96), (32, 96), (64, 128), (256, 256)]:
        plots.save_grid(tmp_path / "g.png", torch.zeros(1, 3, side, side), 1, gap=0)
        assert Image.open(tmp_path / "g.png").size == (shown, shown)


def test_labels_are_never_cut_off(tmp_path):
    path, text = tmp_path / "g.png", "a long label, with more words than pictures"
    plots.save_grid(path, np.full((2, 4, 4, 3), 255, np.uint8), 2, scale=1,
                       row_labels=[text], column_labels=[text, "short"])
    sheet = np.array(Image.open(path))
    edge = np.concatenate([sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]])
    assert sheet.min() < 100 and edge.min() == 255  # there is ink, and none touches the border


def test_heat_map_rises_and_clips():
    colours = plots.heat_map(np.linspace(0, 1, 64)[None])[0].astype(float)
    brightness = colours @ [0.299, 0.587, 0.114]
    assert (np.diff(brightness) > 0).all()
    ends = plots.heat_map(np.array([[-5.0, 0, 1, 9]]), low=0, high=1)[0]
    assert (ends[0] == ends[1]).all() and (ends[2] == ends[3]).all()
    assert (plots.heat_map(np.ones((2, 2))) == plots.heat_map(np.zeros((2, 2)))).all()


def test_token_colours_are_stable_and_spread():
    colours = plots.token_colours(torch.arange(64)[None], 8, 64)
    assert colours.shape == (1, 3, 8, 8) and 0 <= colours.min() and colours.max() <= 1
    later = plots.token_colours(torch.full((2, 1), 5), 1, 512)[1, :, 0, 0]
    assert torch.equal(later, colours[0, :, 0, 5])
    assert torch.pdist(colours[0].reshape(3, -1).T).min() > 0.08


def test_gif_and_curve_can_be_opened(tmp_path):
    frames = [np.full((8, 8, 3), level, np.uint8) for level in (0, 120, 250)]
    plots.save_gif(tmp_path / "a" / "x.gif", frames, 200)
    assert Image.open(tmp_path / "a" / "x.gif").n_frames == 3
    series = {"loss": [(0, 3.0), (10, 2.0), (20, math.nan)], "flat": [(0, 1.0)], "none": []}
    plots.save_curve(tmp_path / "c.png", series, title="t", x_label="step", y_label="loss")
    chart = np.array(Image.open(tmp_path / "c.png")).reshape(-1, 3)
    assert (chart == plots.LINES[0]).all(axis=1).any()
    with pytest.raises(ValueError):
        plots.save_curve(tmp_path / "c.png", {"none": [(0, math.inf)]})


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6))
def test_ticks_enclose_the_range(low, span):
    ticks = plots._ticks(low, low + span)
    assert 4 <= len(ticks) <= 13
    assert ticks[0] <= low + 1e-6 * span and ticks[-1] >= low + span - 1e-6 * span


# The judge and what is measured with it

@pytest.fixture
def one_thread():
    """For networks this small a second thread mostly waits, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_frechet_distance_matches_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    raw -= raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T))).T  # covariance = 1
    wide, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.0, -1.0])
    assert judge.frechet_distance(white, white) == pytest.approx(0, abs=1e-9)
    # Diagonal covariances: sum of squared differences of means and of standard deviations.
    assert judge.frechet_distance(white, white * wide + shift) == pytest.approx(
        1.25 + 0 + 1 + 4, rel=1e-9)
    # Covariances that do not commute, against the plain formula with the product's eigenvalues.
    mix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    a, b = white @ mix, white * wide
    product = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).real.sqrt().sum()
    expected = torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * product
    assert judge.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)
    assert judge.frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-8)


@given(count=st.integers(2, 6), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_frechet_distance_is_never_negative_even_with_few_pictures(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, count, width, generator=generator)
    distance = judge.frechet_distance(a, b)
    assert distance >= 0 and math.isfinite(distance)
    assert judge.frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError):
        judge.frechet_distance(a[:1], b)


def _slow_share_inside(points, members, k):
    """The definition, one pair at a time."""
    inside = 0
    for point in points:
        for i, member in enumerate(members):
            others = sorted((member - other).norm() for j, other in enumerate(members) if j != i)
            if (point - member).norm() <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


@given(seed=st.integers(0, 99), k=st.integers(1, 3))
def test_precision_and_recall_match_the_slow_loop(seed, k):
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(8, 2, generator=generator).double()
    fake = torch.randn(6, 2, generator=generator).double() + 0.5
    assert judge.precision_recall(real, fake, k) == (
        _slow_share_inside(fake, real, k), _slow_share_inside(real, fake, k))


def test_precision_and_recall_at_the_extremes():
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert judge.precision_recall(points, points) == (1, 1)
    assert judge.precision_recall(points, points + 100) == (0, 0)
    # Copies of one real picture look real and cover next to nothing: that is mode collapse.
    precision, recall = judge.precision_recall(points, points[:1].repeat(20, 1))
    assert precision == 1 and recall <= 1 / 50
    with pytest.raises(ValueError):
        judge.precision_recall(points, points[:3])


def test_nearest_neighbours_finds_the_copies():
    points = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    found = judge.nearest_neighbours(points[order] + 1e-4, points)
    assert torch.equal(found, order)


def test_the_judge_learns_is_kept_and_leaves_the_callers_generator_alone(one_thread, tmp_path):
    images, labels, names = shapes.load("train", count=3_000, size=16)  # 16 pixels: for speed
    held_out, held_labels, _ = shapes.load("test", count=300, size=16)
    path, lines = tmp_path / "new" / "judge.pt", []
    before = torch.random.get_rng_state()
    options = {"steps": 45, "seed": 0, "log": lines.append}
    first = judge.load_or_train(path, images, labels, len(names), **options)
    assert torch.equal(before, torch.random.get_rng_state())
    assert judge.accuracy(first, held_out, held_labels) > 0.9
    assert len(lines) == 1 and list(path.parent.iterdir()) == [path]  # no half file left behind
    again = judge.load_or_train(path, images, labels, len(names), **options)
    assert len(lines) == 1  # it was read, not trained
    floats = torch.from_numpy(held_out).permute(0, 3, 1, 2) / 255
    for a, b in zip(judge.extract(first, held_out), judge.extract(again, floats)):
        assert torch.equal(a, b)


def test_training_a_judge_is_repeatable_and_other_settings_replace_the_file(
        one_thread, tmp_path):
    images, labels, _ = shapes.load("train", count=40, size=16)

    class OnDemand:  # what reads from disk offers a length and one picture at a time
        def __len__(self):
            return len(images)

        def __getitem__(self, i):
            return images[i]

    path, lines = tmp_path / "judge.pt", []
    one, two, other = [
        judge.load_or_train(path, data, labels, 10, steps=2, seed=seed, log=lines.append)
        for data, seed in [(images, 0), (OnDemand(), 0), (images, 1)]]
    fresh = judge.train_judge(OnDemand(), labels, 10, steps=2, seed=0, log=lines.append)
    assert len(lines) == 3
    assert torch.equal(one.head.weight, two.head.weight)
    assert torch.equal(one.head.weight, fresh.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


@pytest.mark.parametrize("size", [16, 32, 50, 64, 256])
def test_the_judge_takes_every_size(size):
    network = judge.Judge(7, size).eval()
    images = torch.rand(2, 3, size, size)
    assert network(images).shape == (2, 7)
    assert network.features(images).shape[0] == 2
