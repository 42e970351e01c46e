"""Figures made with Pillow alone: grids of images, colour maps and line charts."""
import functools
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

INK, PALE = (40, 44, 52), (222, 225, 230)
LINES = [(31, 98, 168), (208, 84, 34), (36, 138, 86), (142, 68, 160), (186, 142, 20),
         (90, 96, 106), (22, 158, 178), (218, 74, 130)]
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
    fonts = [ImageFont.load_default(14)]
    for name in FONTS:
        with suppress(OSError):
            fonts.append(ImageFont.truetype(name, 14))
    for font in fonts:
        missing = bytes(font.getmask("\U0010ffff"))        # drawn for unknown characters
        if all(bytes(font.getmask(c)) != missing for c in set(text) - {" ", "\n"}):
            return font
    return None


def class_label(name, number):
    """The name of a class, shortened if it is long, or its number if no font has it."""
    name = " ".join(name.split())
    if len(name) > 22:
        name = f"{name[:12]}...{name[-7:]}"
    # A label such as "as cat" is drawn in one font.
    return name if font_for(f"{name} as 0123456789") else f"class {number}"


def write(pen, place, text, anchor="la", colour=INK):
    """Draw text. anchor: which of its points lies at `place`, in the letters of Pillow."""
    align = "center" if anchor == "mm" else "left"
    pen.text(place, text, colour, font_for(text), anchor, align=align)


def text_size(text):
    """Width and height in pixels. The text may have several lines."""
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    box = pen.multiline_textbbox((0, 0), text, font_for(text))
    return round(box[2] + 0.5), round(box[3] + 0.5)


# -- Grids of images -----------------------------------------------------------------------

def cells(images):
    """Images (3, h, h) of different sizes -> (N, 3, side, side), all as large as the
    largest and at least 96 pixels. Every pixel becomes a rectangle."""
    side = max(96, *(image.shape[-1] for image in images))
    places = [torch.arange(side) * image.shape[-1] // side for image in images]
    return torch.stack([image[:, at[:, None], at] for image, at in zip(images, places)])


def to_uint8(images):
    """Float tensor (N, 3, H, W) in [0, 1], else clipped -> uint8 array (N, H, W, 3)"""
    images = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).cpu().numpy()


def save_grid(path, images, columns, *, row_labels=(), column_labels=(), scale=None,
              footer=None):
    """Write images row by row into one PNG on white. Raises ValueError if there are none.

    images: float tensor (N, 3, H, W) in [0, 1] or uint8 array (N, H, W, 3)
    scale: a whole number (None: cells of about 96 pixels); row_labels, column_labels: a text
    for each; footer: the picture that legend() makes"""
    if torch.is_tensor(images) and images.is_floating_point():
        images = to_uint8(images)
    if len(images) == 0:
        raise ValueError("save_grid needs at least one image")
    gap, scale = 2, scale or max(1, round(96 / images.shape[2]))
    images = np.asarray(images).repeat(scale, axis=1).repeat(scale, axis=2)
    # Labels set the margins, and a wide column label widens its column, so none is cut off.
    row_sizes = [text_size(text) for text in row_labels]
    column_sizes = [text_size(text) for text in column_labels]
    left = gap + max([width + 10 for width, _ in row_sizes], default=0)
    top = gap + max([height + 8 for _, height in column_sizes], default=0)
    step_x = max([images.shape[2] + gap, *(width + 8 for width, _ in column_sizes)])
    step_y = max([images.shape[1] + gap, *(height + 4 for _, height in row_sizes)])
    width, height = left + columns * step_x, top + -(-len(images) // columns) * step_y
    footer = footer or Image.new("RGB", (0, 0))
    sheet = Image.new("RGB", (max(width, footer.width), height + footer.height), "white")
    sheet.paste(footer, (0, height))
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x = left + i % columns * step_x + (step_x - gap - image.shape[1]) // 2
        sheet.paste(Image.fromarray(image), (x, top + i // columns * step_y))
    for i, text in enumerate(row_labels):
        write(pen, (left - gap - 6, top + i * step_y + images.shape[1] // 2), text, "rm")
    for i, text in enumerate(column_labels):
        write(pen, (left + i * step_x + (step_x - gap) // 2, (top - gap) // 2), text, "mm")
    save(sheet, path)


def legend(text):
    """Lines of text as a picture, for the footer of save_grid()."""
    width, height = text_size(text)
    picture = Image.new("RGB", (width + 16, height + 14), "white")
    write(ImageDraw.Draw(picture), (8, 6), text)
    return picture


def save(picture, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


# -- Colours -------------------------------------------------------------------------------

def heat_map(matrix, low=None, high=None):
    """Matrix (..., H, W) -> uint8 (..., H, W, 3), from dark blue for `low` to yellow."""
    matrix = np.asarray(matrix, dtype=np.float64)
    low = matrix.min() if low is None else low
    high = matrix.max() if high is None else high
    # A constant matrix has no range; it is drawn in the lowest colour.
    place = np.clip((matrix - low) / max(high - low, 1e-12), 0, 1) * (len(HEAT) - 1)
    colours = [np.interp(place, np.arange(len(HEAT)), HEAT[:, c]) for c in range(3)]
    return np.stack(colours, axis=-1).round().astype(np.uint8)


def heat_maps(matrices, low, high):
    """Tensor (N, h, w) -> heat_map() of each, floats (N, 3, h, w)"""
    return torch.from_numpy(heat_map(matrices.cpu(), low, high)).permute(0, 3, 1, 2) / 255


def token_colours(tokens, side, vocab_size):
    """Tokens (N, side*side) -> one colour each, floats (N, 3, side, side). The number of a
    code means nothing, so neighbouring numbers get colours far apart: multiples of
    irrational numbers fill the colour cube evenly."""
    numbers = torch.arange(vocab_size, dtype=torch.float64)[:, None] + 1
    steps = torch.tensor([0.8191725134, 0.6710436067, 0.5497004779], dtype=torch.float64)
    table = (0.12 + 0.83 * (numbers * steps).frac()).float()              # (V, 3)
    return table[tokens.reshape(-1, side, side).cpu()].permute(0, 3, 1, 2)


# -- Line charts ---------------------------------------------------------------------------

def axis(values, log, begin, end):
    """An axis from pixel `begin` to pixel `end`, a little longer than the values need.
    -> a function from numbers to pixels; ticks, which are round numbers"""
    def linear(value):
        return math.log10(value) if log else value

    def place(value):
        return begin + (linear(value) - low) / (high - low) * (end - begin)
    low, high = linear(min(values)), linear(max(values))
    room = 0.04 * (high - low) or 0.5                      # one value lies in the middle
    low, high = low - room, high + room
    if log and high - low > 1:                             # more than a decade: 1, 2, 5, 10, ...
        ticks = [digit * 10.0 ** power for power in range(-12, 13) for digit in (1, 2, 5)]
        return place, [tick for tick in ticks if low <= linear(tick) <= high]
    first, last = (10 ** low, 10 ** high) if log else (low, high)
    step = 10.0 ** math.floor(math.log10((last - first) / 4))
    step *= max(digit for digit in (1, 2, 5) if digit * step <= (last - first) / 4)
    return place, [k * step for k in range(math.ceil(first / step), int(last // step) + 1)]


def save_curve(path, series, *, title="", x_label="", y_label="", size=(720, 400), log=""):
    """Write a line chart. series: name -> list of (x, y); what cannot be drawn is left out.
    log: the logarithmic axes, "x", "y" or "xy" (with "xy", powers become straight lines).
    Raises ValueError if no point is left."""
    def drawable(point):
        return all(math.isfinite(value) and (value > 0 or name not in log)
                   for name, value in zip("xy", point))
    lines = {name: list(filter(drawable, points)) for name, points in series.items()}
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError("save_curve needs at least one point")
    left, right = 80, size[0] - 60 - max(text_size(name)[0] for name in lines)
    top, bottom = 52, size[1] - 50
    x_of, x_ticks = axis([x for x, _ in points], "x" in log, left, right)
    y_of, y_ticks = axis([y for _, y in points], "y" in log, bottom, top)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for tick in x_ticks:
        pen.line([(x_of(tick), top), (x_of(tick), bottom)], PALE)
        write(pen, (x_of(tick), bottom + 6), f"{tick:,.10g}", "mt")
    for tick in y_ticks:
        pen.line([(left, y_of(tick)), (right, y_of(tick))], PALE)
        write(pen, (left - 6, y_of(tick)), f"{tick:,.10g}", "rm")
    write(pen, (left, 6), title)
    write(pen, (left, 27), y_label)
    write(pen, (right, size[1] - 22), x_label, "rt")
    for i, (name, line) in enumerate(lines.items()):
        colour = LINES[i % len(LINES)]
        places = [(x_of(x), y_of(y)) for x, y in line]
        pen.line(places, colour, 2)
        for x, y in places if len(places) < 10 else []:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        write(pen, (right + 14, top + 22 * i), name, "la", colour)
    save(sheet, path)
