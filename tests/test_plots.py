"""Figures: every pixel of a grid in its place, no label cut off, colours that mean something."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from report import plots


@given(count=st.integers(1, 7), columns=st.integers(1, 4), side=st.integers(1, 5),
       scale=st.integers(1, 3), gap=st.integers(0, 3))
def test_every_pixel_of_a_grid_lands_where_it_should(tmp_path_factory, count, columns, side, scale,
                                                     gap):
    images = np.random.default_rng(count).integers(0, 255, (count, side, side, 3), np.uint8)
    path = tmp_path_factory.mktemp("grid") / "new" / "grid.png"
    plots.save_grid(path, images, columns, scale=scale, gap=gap)
    sheet, step = np.array(Image.open(path)), side * scale + gap
    expected = np.full((gap + -(-count // columns) * step, gap + columns * step, 3), 255, np.uint8)
    for i, y, x in np.ndindex(count, side * scale, side * scale):
        expected[gap + i // columns * step + y, gap + i % columns * step + x] = (
            images[i, y // scale, x // scale])
    assert (sheet == expected).all()


def test_labels_and_legends_are_never_cut_off(tmp_path):
    path, text = tmp_path / "g.png", "a long label, with more words\nthan pictures"
    plots.save_grid(path, np.full((2, 4, 4, 3), 255, np.uint8), 2, scale=1, row_labels=[text],
                    column_labels=[text, "short"], footer=plots.legend(text, ["none", "all"]))
    sheet = np.array(Image.open(path))
    edge = np.concatenate([sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]])
    assert sheet.min() < 100 and edge.min() == 255  # there is ink, and none touches the border
    bar = np.array(plots.legend("text", ["0", "1/2", "1"]))[16, 50:450]
    assert (bar == plots.heat_map(np.linspace(0, 1, 400)[None])[0]).all()


def test_images_outside_0_to_1_are_cut_and_small_ones_are_enlarged(tmp_path):
    images = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert plots.to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    found = plots.enlarge(row := torch.rand(2, 3, 2, 5), 7)
    for y, x in np.ndindex(7, 7):
        assert torch.equal(found[:, :, y, x], row[:, :, y * 2 // 7, x * 5 // 7])
    for side, shown in [(8, 96), (32, 96), (64, 128), (256, 256)]:
        plots.save_grid(tmp_path / "g.png", torch.zeros(1, 3, side, side), 1, gap=0)
        assert Image.open(tmp_path / "g.png").size == (shown, shown)
    with pytest.raises(ValueError):
        plots.save_grid(tmp_path / "g.png", torch.zeros(0, 3, 8, 8), 1)


def test_colours_of_heat_rise_and_clip_and_those_of_tokens_are_stable_and_spread():
    rising = plots.heat_maps(torch.linspace(0, 1, 64).view(1, 1, 64), 0, 1)[0, :, 0]
    assert (torch.tensor([0.299, 0.587, 0.114]) @ rising).diff().min() > 0
    ends = plots.heat_map(np.array([[-5.0, 0, 1, 9]]), low=0, high=1)[0]
    assert (ends[0] == ends[1]).all() and (ends[2] == ends[3]).all()
    assert (plots.heat_map(np.ones((2, 2))) == plots.heat_map(np.zeros((2, 2)))).all()
    colours = plots.token_colours(torch.arange(64)[None], 8, 64)
    assert colours.shape == (1, 3, 8, 8) and 0 <= colours.min() and colours.max() <= 1
    later = plots.token_colours(torch.full((2, 1), 5), 1, 512)[1, :, 0, 0]
    assert torch.equal(later, colours[0, :, 0, 5])
    assert torch.pdist(colours[0].reshape(3, -1).T).min() > 0.08


def line_of(path, colour=plots.LINES[0]):
    """The heights at which a chart draws this colour, column after column (0: the lower edge)."""
    chart = (np.array(Image.open(path)) == colour).all(2)[48:]
    return [len(chart) - np.flatnonzero(column).mean() for column in chart.T if column.any()]


@pytest.mark.parametrize("log, power", [("", 1), ("x", 0), ("y", 0), ("xy", 3)])
def test_a_chart_draws_what_its_axes_promise_as_a_straight_line(tmp_path, log, power):
    """x to a power is straight when both axes are logarithmic, log x and exp x when one is."""
    curve = {"x": lambda x: 5 + math.log(x), "y": lambda x: math.exp(x / 20)}.get(
        log, lambda x: x ** power)
    points = [(x, curve(x)) for x in range(1, 100)]
    plots.save_curve(tmp_path / "c.png", {"a": [*points, (3, math.nan), (math.inf, 1)], "b": []},
                     log=log)
    with pytest.raises(ValueError):
        plots.save_curve(tmp_path / "none.png", {"a": [(0, math.inf)], "b": []}, log=log)
    heights = np.array(line_of(tmp_path / "c.png"))[10:-10]
    assert len(heights) > 100
    straight = np.polyval(np.polyfit(range(len(heights)), heights, 1), range(len(heights)))
    assert abs(heights - straight).max() < 3 and heights[-1] > heights[0] + 100


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6))
def test_ticks_enclose_the_range(low, span):
    ticks = plots._ticks(low, low + span)
    assert 4 <= len(ticks) <= 13
    assert ticks[0] <= low + 1e-6 * span and ticks[-1] >= low + span - 1e-6 * span
