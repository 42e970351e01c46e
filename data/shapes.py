"""The built-in data set: ten kinds of figure, each drawn from (seed, split, index) alone.

Only + - * / and square roots touch the numbers. IEEE rounds these exactly, so every machine
should draw the same bytes.

A figure is a list of signed distances: negative inside, in units of the figure's radius. The
distance in pixels determines how much of a pixel the figure covers, which gives smooth edges
at every size: image i at 256 pixels is image i at 32 pixels, only sharper.
"""
import numpy as np

from engine import BadInput

CLASS_NAMES = "heart star moon ring flower house tree mushroom fish boat".split()
COUNT = {"train": 20_000, "test": 4_000}

# Figures are saturated and of medium brightness, backgrounds are pale: any pair contrasts.
FIGURES = np.float32([
    [214, 57, 61], [235, 110, 52], [226, 158, 34], [108, 160, 58], [38, 140, 96],
    [26, 146, 160], [48, 112, 196], [92, 82, 184], [150, 74, 170], [216, 76, 134]]) / 255
BACKGROUNDS = np.float32([
    [206, 226, 244], [212, 236, 220], [248, 232, 206], [228, 220, 244], [248, 222, 222],
    [226, 228, 232]]) / 255
# The paint of a layer: a share of the figure's own colour, plus a fixed colour.
MAIN, DARK, PALE = (1, 0), (0.62, 0), (0.3, 0.7 * (np.float32([255, 248, 232]) / 255))
INK, WOOD = (0, np.float32([74, 56, 52]) / 255), (0, np.float32([164, 122, 88]) / 255)


def load(split, *, data_dir=None, size=32):
    """The split "train" or "test": images uint8 (N, size, size, 3), labels int64 (N,), class
    names. `data_dir` is not used. Raises BadInput for a size out of range."""
    images, labels = draw(np.arange(COUNT[split]), split=split, size=size)
    return images, labels, list(CLASS_NAMES)


def draw(indices, *, split="train", size=32, seed=0):
    """The images with these indices (integers >= 0, in any order).
    -> images uint8 (N, size, size, 3), labels int64 (N,), which are index % 10"""
    if not 16 <= size <= 256:
        raise BadInput(f"shapes: size must be 16 to 256 pixels, not {size}")
    indices = np.asarray(indices, dtype=np.int64)
    labels = indices % len(CLASS_NAMES)
    images = np.empty((len(indices), size, size, 3), np.uint8)
    for label, name in enumerate(CLASS_NAMES):
        rows = np.flatnonzero(labels == label)
        parts = 1 + len(rows) * size**2 // 2**17      # of half a megabyte per float32 plane
        for part in np.array_split(rows, parts):
            images[part] = _render(name, _uniforms(indices[part], split, seed), size)
    return images, labels


def _uniforms(indices, split, seed):
    """(N, 7) numbers in [0, 1), hashed from seed, split and index by splitmix64."""
    def mix(word):
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return word ^ (word >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):                  # the hash relies on wrapping at 2**64
        stream = np.uint64(seed % 2**63 * 2) + np.uint64(split == "test")
        word = mix(np.asarray(indices, np.uint64) + mix(golden * (stream + np.uint64(1))))
        word = mix(word[:, None] + np.arange(1, 8, dtype=np.uint64) * golden)
    return (word >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def _render(name, uniforms, size):
    """Paint one kind of figure: uniforms (N, 7) -> uint8 (N, size, size, 3)."""
    hue, back, radius, left, up, turn, ramp = uniforms.T[:, :, None, None]  # (N, 1, 1) each
    main = FIGURES[(hue * len(FIGURES)).astype(np.int64)[:, 0, 0]]          # (N, 3)
    paper = BACKGROUNDS[(back * len(BACKGROUNDS)).astype(np.int64)[:, 0, 0]]  # (N, 3)
    radius = 0.33 + 0.07 * radius                                 # share of the image's side
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    x = (axis[None, None, :] - 0.10 * (left - 0.5)) / radius                # (N, 1, size)
    y = (0.10 * (up - 0.5) - axis[None, :, None]) / radius                  # (N, size, 1)
    # Half-angle tangent instead of sin and cos, whose last bit differs between machines.
    half = 0.22 * (turn - 0.5)                                  # rotates by up to 0.22 rad
    cos, sin = (1 - half**2) / (1 + half**2), 2 * half / (1 + half**2)

    shade = (1 - (0.04 + 0.10 * ramp) * (axis[None, :, None] + 0.5))   # darker at the ground
    light = 1 + 0.13 * np.clip(0.7 * y - 0.7 * x, -1, 1)            # lit from the upper left
    planes = paper.T[:, :, None, None] * shade + 0 * x                  # (3, N, size, size)
    for distance, paint in _layers(name, cos * x - sin * y, sin * x + cos * y):
        cover = np.clip(0.5 - distance * (radius * size), 0, 1)
        colour = paint[0] * main + paint[1]                                 # (N, 3)
        planes += cover * (colour.T[:, :, None, None] * light - planes)
    return (np.clip(planes.transpose(1, 2, 3, 0), 0, 1) * 255 + 0.5).astype(np.uint8)


# Signed distances: arrays x, y (N, size, size), y upwards -> distance (N, size, size).
def _disc(x, y, x0, y0, radius):
    return np.sqrt((x - x0)**2 + (y - y0)**2) - radius


def _box(x, y, x0, y0, half_width, half_height):
    across, along = abs(x - x0) - half_width, abs(y - y0) - half_height
    outside = np.sqrt(np.maximum(across, 0)**2 + np.maximum(along, 0)**2)
    return outside + np.minimum(np.maximum(across, along), 0)


def _polygon(x, y, *corners, rounding=0.0):
    """Distance to a closed polygon. A point is inside if a ray to the right crosses an odd
    number of edges."""
    squared, inside = np.full_like(x, np.inf), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        edge_x, edge_y, to_x, to_y = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((to_x * edge_x + to_y * edge_y) / (edge_x**2 + edge_y**2), 0, 1)
        off_x, off_y = to_x - along * edge_x, to_y - along * edge_y
        squared = np.minimum(squared, off_x**2 + off_y**2)
        if ay != by:
            inside ^= ((y >= ay) != (y >= by)) & (to_x < to_y * (edge_x / edge_y))
    return np.sqrt(squared) * np.where(inside, -1, 1).astype(x.dtype) - rounding


def _layers(name, x, y):
    """A figure, which fills a circle of radius about 1 -> [(distance, paint)], back to front"""
    match name:
        case "heart":
            x, y = abs(x) / 1.7, (y + 0.92) / 1.7
            lobe = np.sqrt((x - 0.25)**2 + (y - 0.75)**2) - np.float32(0.5 * 0.5**0.5)
            foot = np.maximum(x + y, 0) / 2
            side = np.sqrt(np.minimum(x**2 + (y - 1)**2, (x - foot)**2 + (y - foot)**2))
            distance = np.where(x + y > 1, lobe, np.where(x > y, side, -side))
            return [(1.7 * distance, MAIN)]
        case "star":
            corners = [(0, 1), (.26, .36), (.95, .31), (.43, -.14), (.59, -.81), (0, -.45),
                       (-.59, -.81), (-.43, -.14), (-.95, .31), (-.26, .36)]
            return [(_polygon(x, y, *corners, rounding=0.06), MAIN)]
        case "moon":
            night = _disc(x, y, 0.42, 0.18, 0.80)
            return [(np.maximum(_disc(x, y, 0, 0, 1), -night), MAIN)]
        case "ring":
            return [(abs(_disc(x, y, 0, 0, 0.72)) - 0.26, MAIN)]
        case "flower":
            centres = [(0, .6), (.57, .19), (.35, -.49), (-.35, -.49), (-.57, .19)]
            petals = [_disc(x, y, x0, y0, 0.40) for x0, y0 in centres]
            return [(np.minimum.reduce(petals), MAIN), (_disc(x, y, 0, 0, 0.32), PALE)]
        case "house":
            roof = _polygon(x, y, (-.95, .06), (.95, .06), (0, .95), rounding=0.05)
            return [(_box(x, y, 0, -0.42, 0.70, 0.50), MAIN), (roof, DARK),
                    (_box(x, y, 0.0, -0.56, 0.20, 0.36), PALE)]
        case "tree":
            crown = [_polygon(x, y, (-w, low), (w, low), (0, top), rounding=0.05)
                     for w, low, top in [(.78, -.58, .20), (.62, -.10, .62), (.44, .36, 1.0)]]
            return [(_box(x, y, 0, -0.78, 0.15, 0.24), WOOD), (np.minimum.reduce(crown), MAIN)]
        case "mushroom":
            cap = np.maximum(_disc(x, y, 0, -0.08, 1.0), -0.08 - y)
            dots = [_disc(x, y, x0, y0, radius)
                    for x0, y0, radius in [(-.48, .26, .16), (.06, .56, .18), (.50, .18, .16)]]
            return [(_box(x, y, 0, -0.45, 0.24, 0.45) - 0.06, WOOD), (cap, MAIN),
                    (np.minimum.reduce(dots), PALE)]
        case "fish":
            above, below = _disc(x, y, -0.18, -0.50, 1.02), _disc(x, y, -0.18, 0.50, 1.02)
            tail = _polygon(x, y, (.45, 0), (.98, .48), (.98, -.48), rounding=0.04)
            return [(tail, DARK), (np.maximum(above, below), MAIN),
                    (_disc(x, y, -0.58, 0.10, 0.17), PALE), (_disc(x, y, -0.58, 0.10, 0.09), INK)]
        case "boat":
            return [(_box(x, y, 0, 0.15, 0.06, 0.78), WOOD),
                    (_polygon(x, y, (.12, -.22), (.82, -.22), (.12, .90)), MAIN),
                    (_polygon(x, y, (-.12, -.22), (-.66, -.22), (-.12, .62)), PALE),
                    (_polygon(x, y, (-1, -.38), (1, -.38), (.62, -.86), (-.62, -.86)), DARK)]
