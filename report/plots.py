"""Figures made with Pillow alone: grids of images, colour maps and line charts."""
import functools
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

INK, PALE = (40, 44, 52), (222, 225, 230)
LINES = [(31, 98, 168), (208, 84, 34), (36, 138, 86), (142, 68, 160), (186, 142, 20),
         (120, 120, 120), (214, 80, 140), (60, 180, 200), (110, 70, 40)]
# Brightness rises from first to last, so the colours also work in black and white.
HEAT = np.array([[16, 20, 62], [32, 60, 122], [30, 110, 140], [42, 158, 130],
                 [150, 202, 84], [252, 232, 84]], dtype=np.float64)
# Fonts of Linux, macOS and Windows with many alphabets, for names that Pillow's font lacks.
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "arial.ttf",
         "Arial Unicode.ttf", "msyh.ttc", "malgun.ttf", "seguiemj.ttf")


# -- Text ----------------------------------------------------------------------------------

@functools.cache
def font_for(text):
    """A font with all characters of the text: Pillow's own, one of this system, or None"""
    for name in (None, *FONTS):
        try:
            font = ImageFont.truetype(name, 14) if name else ImageFont.load_default(14)
        except OSError:
            continue
        missing = bytes(font.getmask("\U0010ffff"))        # drawn for unknown characters
        if all(bytes(font.getmask(c)) != missing for c in text if not c.isspace()):
            return font
    return None


def class_label(name, number):
    """The name of a class, shortened if it is long, or its number if no font has it."""
    name = name if len(name) <= 22 else f"{name[:12]}...{name[-7:]}"
    # A label such as "as cat" is drawn in one font.
    return name if font_for(f"as {name}, cfg 0") else f"class {number}"


def legend(text, colour=INK):
    """Lines of text as a picture on white, with a small margin."""
    font = font_for(text)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    _, _, width, height = pen.multiline_textbbox((6, 4), text, font)
    picture = Image.new("RGB", (math.ceil(width) + 6, math.ceil(height) + 5), "white")
    ImageDraw.Draw(picture).text((6, 4), text, colour, font)
    return picture


# -- Grids of images -----------------------------------------------------------------------

def to_uint8(images):
    """Float tensor (N, 3, H, W) in [0, 1], else clipped -> uint8 array (N, H, W, 3)"""
    images = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).cpu().numpy()


def save_grid(path, rows, *, column_labels=(), scale=None, footer=""):
    """Write rows of images into one PNG on white. rows: {text beside a row: floats
    (n, 3, H, W) in [0, 1]}, n alike; column_labels: a text for each; scale: a whole number
    (None: cells of about 96 pixels); footer: lines of text"""
    images, columns = torch.cat([*rows.values()]), len(next(iter(rows.values())))
    gap, scale = 2, scale or max(1, round(96 / images.shape[3]))
    images = to_uint8(images).repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = images.shape[1:3]
    # Labels set the margins, and a large label widens its row or column: none is cut off.
    beside = [legend(text) for text in rows]
    above = [legend(text) for text in column_labels]
    below = legend(footer) if footer else Image.new("RGB", (0, 0))
    left = max(label.width for label in beside)
    top = max([gap, *(label.height for label in above)])
    step_x = max([width + gap, *(label.width for label in above)])
    step_y = max([height + gap, *(label.height for label in beside)])
    bottom = top + len(rows) * step_y
    sheet = Image.new("RGB", (max(left + columns * step_x, below.width),
                              bottom + below.height), "white")
    for i, image in enumerate(images):
        x = left + i % columns * step_x + (step_x - gap - width) // 2
        sheet.paste(Image.fromarray(image), (x, top + i // columns * step_y))
    for i, label in enumerate(beside):
        y = top + i * step_y + max(0, (height - label.height) // 2)
        sheet.paste(label, (left - label.width, y))
    for i, label in enumerate(above):
        x = left + i * step_x + (step_x - gap - label.width) // 2
        sheet.paste(label, (x, 0))
    sheet.paste(below, (0, bottom))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"wrote {path}")


# -- Colours -------------------------------------------------------------------------------

def heat_map(matrix, low=None, high=None):
    """Tensor (..., H, W) -> floats (..., 3, H, W), from dark blue for `low` (None: the
    least value) to yellow for `high` (None: the largest)."""
    matrix = matrix.detach().cpu().double().numpy()
    low = matrix.min() if low is None else low
    high = matrix.max() if high is None else high
    place = np.clip((matrix - low) / (high - low), 0, 1) * (len(HEAT) - 1)
    colours = [np.interp(place, np.arange(len(HEAT)), HEAT[:, c]) for c in range(3)]
    return torch.from_numpy(np.stack(colours, axis=-3)).float() / 255


def token_colours(tokens, side, vocab_size):
    """Tokens (N, side*side) -> one colour each, floats (N, 3, side, side). The number of a
    code means nothing, so neighbouring numbers get colours far apart: multiples of
    irrational numbers fill the colour cube evenly."""
    numbers = torch.arange(vocab_size, dtype=torch.float64)[:, None] + 1
    steps = torch.tensor([0.8191725134, 0.6710436067, 0.5497004779], dtype=torch.float64)
    table = (0.12 + 0.83 * (numbers * steps).frac()).float()              # (V, 3)
    return table[tokens.reshape(-1, side, side).cpu()].permute(0, 3, 1, 2)


# -- Line charts ---------------------------------------------------------------------------

def save_curve(path, series, fits=None, *, x_label="", y_label=""):
    """Write dots and lines on two logarithmic axes, on which powers become straight lines.
    series: name -> list of (x, y), positive numbers; fits: the same for the lines (None:
    they join the dots)"""
    dots = [np.log10(line) for line in series.values()]                  # (N, 2) each
    lines = [np.log10(fits[name]) for name in series] if fits else dots
    low = np.min([line.min(axis=0) for line in dots + lines], axis=0)    # (x, y)
    high = np.max([line.max(axis=0) for line in dots + lines], axis=0)
    names = [legend(name, LINES[i % len(LINES)]) for i, name in enumerate(series)]
    left, bottom = begin = np.array([80, 350])             # pixels of the smallest x and y
    right, top = end = np.array([660 - max(name.width for name in names), 40])
    sheet = Image.new("RGB", (720, 400), "white")
    pen = ImageDraw.Draw(sheet)
    for share in np.linspace(0, 1, 5):
        x, y = begin + share * (end - begin)
        pen.line([(x, top), (x, bottom)], PALE)
        pen.line([(left, y), (right, y)], PALE)
        ticks = 10 ** (low + share * (high - low))
        below, beside = [legend(f"{value:,.4g}") for value in ticks]
        sheet.paste(below, (int(x) - below.width // 2, bottom + 4))
        sheet.paste(beside, (left - beside.width, int(y) - beside.height // 2))
    sheet.paste(legend(y_label), (left, 6))
    sheet.paste(legend(x_label), (right - legend(x_label).width, bottom + 24))
    for i, name in enumerate(names):
        colour = LINES[i % len(LINES)]
        on_line, on_dots = (begin + (points - low) / (high - low) * (end - begin)
                            for points in (lines[i], dots[i]))
        pen.line([tuple(place) for place in on_line], colour, 2)
        for x, y in on_dots:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        sheet.paste(name, (right + 14, top + 22 * i))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"wrote {path}")
