"""Figures made with Pillow alone: grids of images, heat maps, token maps, line charts, GIFs."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

INK, PALE = (40, 44, 52), (222, 225, 230)
LINES = [(31, 98, 168), (208, 84, 34), (36, 138, 86), (142, 68, 160), (186, 142, 20), (90, 96, 106),
         (22, 158, 178), (218, 74, 130)]
# Brightness rises from the first to the last, so the map reads the same in black and white.
HEAT = np.array([[16, 20, 62], [32, 60, 122], [30, 110, 140], [42, 158, 130], [150, 202, 84],
                 [252, 232, 84]], dtype=np.float64)


def enlarge(images, side):
    """Nearest neighbours: (N, C, h, w) -> (N, C, side, side), every pixel a rectangle."""
    rows, columns = (torch.arange(side) * n // side for n in images.shape[2:])
    return images[:, :, rows[:, None], columns]


def cells(images):
    """Images (3, h, w) of different sizes -> (N, 3, side, side), of the size of the largest but at
    least 96 pixels."""
    side = max(96, *(image.shape[-1] for image in images))
    return torch.cat([enlarge(image[None], side) for image in images])


def to_uint8(images):
    """Float tensor (N, 3, H, W) in [0, 1] -> uint8 array (N, H, W, 3); what lies outside is cut."""
    images = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).cpu().numpy()


def save_grid(path, images, columns, *, row_labels=None, column_labels=None, scale=None, gap=2,
              footer=None):
    """Write images row by row into one PNG on white.

    images: float tensor (N, 3, H, W) in [0, 1] or uint8 array (N, H, W, 3). `scale` is a whole
    number (None: cells of about 96 pixels); `gap` is the white between cells, in pixels.
    Labels are lists of text, one per row or column; `footer` is the picture that legend() makes.
    Raises ValueError when there is no picture."""
    images = to_uint8(images) if torch.is_tensor(images) and images.is_floating_point() else images
    images = np.asarray(images)
    if len(images) == 0:
        raise ValueError("save_grid needs at least one picture")
    scale = scale or max(1, round(96 / images.shape[2]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)  # nearest: every pixel a square
    high, wide = images.shape[1] + gap, images.shape[2] + gap
    rows, font = -(-len(images) // columns), ImageFont.load_default(size=14)
    # The labels set the margins, and a wide column label the width of its column: none is cut.
    left = max([_text_size(font, text)[0] + 10 for text in row_labels or []], default=0)
    top = max([_text_size(font, text)[1] + 8 for text in column_labels or []], default=0)
    wide = max([wide] + [_text_size(font, text)[0] + 8 for text in column_labels or []])
    low = max([high] + [_text_size(font, text)[1] + 4 for text in row_labels or []])
    width, height = left + gap + columns * wide, top + gap + rows * low
    under = footer.size if footer else (0, 0)
    sheet = Image.new("RGB", (max(width, under[0]), height + under[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x = left + gap + i % columns * wide + (wide - gap - image.shape[1]) // 2
        sheet.paste(Image.fromarray(image), (x, top + gap + i // columns * low))
    for row, text in enumerate(row_labels or []):
        pen.text((left - 6, top + gap + row * low + (high - gap) // 2), text, INK, font, "rm")
    for column, text in enumerate(column_labels or []):
        pen.text((left + gap + column * wide + (wide - gap) // 2, top // 2), text, INK, font, "mm",
                 align="center")
    if footer:
        sheet.paste(footer, (0, height))
    _save(sheet, path)


def legend(text, ticks=()):
    """A footer for save_grid(): lines of text, under a bar of the heat map's colours with `ticks`,
    texts for its two ends and for points at equal distances between them. -> a Pillow image"""
    font = ImageFont.load_default(size=14)
    width, height = _text_size(font, text)
    top = 50 if ticks else 6
    sheet = Image.new("RGB", (max(width + 16, 500 if ticks else 0), top + height + 8), "white")
    pen = ImageDraw.Draw(sheet)
    pen.multiline_text((8, top), text, INK, font)
    if ticks:
        bar = heat_map(np.linspace(0, 1, 400)[None].repeat(14, 0))
        sheet.paste(Image.fromarray(bar), (50, 10))
        for i, tick in enumerate(ticks):
            pen.text((50 + 400 * i / (len(ticks) - 1), 27), tick, INK, font, "mt")
    return sheet


def heat_map(matrix, low=None, high=None):
    """Matrix (H, W) -> colours uint8 (H, W, 3), dark blue for `low`, over teal, to yellow."""
    matrix = np.asarray(matrix, dtype=np.float64)
    low = matrix.min() if low is None else low
    high = matrix.max() if high is None else high
    # A constant matrix has no range to spread; it is drawn in the lowest colour.
    place = np.clip((matrix - low) / max(high - low, 1e-12), 0, 1) * (len(HEAT) - 1)
    colours = [np.interp(place, np.arange(len(HEAT)), HEAT[:, c]) for c in range(3)]
    return np.stack(colours, axis=-1).round().astype(np.uint8)


def heat_maps(matrices, low, high):
    """Tensor (N, h, w) -> heat_map() of each, floats (N, 3, h, w)"""
    return torch.from_numpy(heat_map(matrices.cpu(), low, high)).permute(0, 3, 1, 2) / 255


def token_colours(tokens, side, vocab_size):
    """Tokens (N, side*side), each in 0..vocab_size-1 -> one colour each, floats (N, 3, side, side).

    Neighbouring ids get colours far apart, because a code's number means nothing: a quasi-random
    sequence (steps of an irrational number) fills the colour cube without clumps.
    """
    ids = torch.arange(vocab_size, dtype=torch.float64)[:, None] + 1
    steps = torch.tensor([0.8191725134, 0.6710436067, 0.5497004779], dtype=torch.float64)
    table = (0.12 + 0.83 * (ids * steps).frac()).float()                    # (V, 3)
    return table[tokens.reshape(-1, side, side).cpu()].permute(0, 3, 1, 2)


def save_gif(path, frames, milliseconds):
    """Write frames, a list of uint8 (H, W, 3), as a GIF that repeats for ever."""
    images = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    _save(images[0], path, save_all=True, append_images=images[1:], duration=milliseconds,
          loop=0)


def save_curve(path, series, *, title="", x_label="", y_label="", size=(720, 400), log=""):
    """Write a line chart. series: name -> list of (x, y); points that are not finite are left out.
    log: the axes that are logarithmic ("x", "y" or "xy"; all their numbers above 0): with "xy",
    powers are straight lines. Raises ValueError when no point is left."""
    with np.errstate(divide="ignore"):
        series = {name: [(np.log10(x) if "x" in log else x, np.log10(y) if "y" in log else y)
                         for x, y in points] for name, points in series.items()}
    series = {name: [point for point in points if np.isfinite(point).all()]
              for name, points in series.items()}
    every = np.array([point for points in series.values() for point in points], dtype=np.float64)
    if len(every) == 0:
        raise ValueError("save_curve needs at least one finite point")
    x_ticks, y_ticks = ((_log_ticks if axis in log else _ticks)(*_range(values))
                        for axis, values in zip("xy", every.T))
    x_names, y_names = ([f"{10 ** tick if axis in log else tick:,g}" for tick in ticks]
                        for axis, ticks in (("x", x_ticks), ("y", y_ticks)))
    font = ImageFont.load_default(size=13)
    left = 20 + max(_text_size(font, name)[0] for name in y_names)
    right, top, bottom = size[0] - 24, 48, size[1] - 44
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)

    def place(x, y):
        return (left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - left),
                bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top))

    for tick, name in zip(x_ticks, x_names):
        pen.line([place(tick, y_ticks[0]), place(tick, y_ticks[-1])], PALE)
        pen.text((place(tick, 0)[0], bottom + 5), name, INK, font, "mt")
    for tick, name in zip(y_ticks, y_names):
        pen.line([place(x_ticks[0], tick), place(x_ticks[-1], tick)], PALE)
        pen.text((left - 6, place(0, tick)[1]), name, INK, font, "rm")
    pen.text((left, 8), title, INK, font)
    pen.text((left, 27), y_label, INK, font)
    pen.text((right, size[1] - 20), x_label, INK, font, "rt")
    x = right
    for i, (name, points) in reversed(list(enumerate(series.items()))):
        colour = LINES[i % len(LINES)]
        pen.line([place(*point) for point in points], colour, 2)
        for x_, y_ in [place(*point) for point in points] if len(points) < 10 else []:
            pen.ellipse((x_ - 3, y_ - 3, x_ + 3, y_ + 3), colour)
        x -= _text_size(font, name)[0] + 14      # the names of the lines, right to left on top
        pen.text((x + 8, 8), name, colour, font)
    _save(sheet, path)


def _log_ticks(low, high):
    """Logarithms of 1, 2 and 5 times powers of ten, from below `low` to above `high`."""
    near = [np.log10(m) + e for e in range(int(low) - 2, int(high) + 2) for m in (1, 2, 5)]
    first, last = max(t for t in near if t <= low + 1e-9), min(t for t in near if t >= high - 1e-9)
    return [t for t in near if first <= t <= last]


def _range(values):
    """Lowest and highest; a single value gets room on both sides so that it can be drawn."""
    low, high = values.min(), values.max()
    room = 0.0 if high > low else max(abs(low), 1.0) / 2
    return low - room, high + room


def _ticks(low, high):
    """Four to ten round numbers (steps of 1, 2 or 5 times a power of ten) around [low, high]."""
    power = 10.0 ** np.floor(np.log10((high - low) / 4))
    step = power * max(m for m in (1, 2, 5) if m * power <= (high - low) / 4)
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    return [float(f"{k * step:.10g}") for k in np.arange(first, last + 1)]


def _text_size(font, text):
    """Width and height in pixels; text may have several lines."""
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return round(box[2] + 0.5), round(box[3] + 0.5)


def _save(picture, path, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
