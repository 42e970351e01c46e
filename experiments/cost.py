"""What does it cost to draw one image, scale by scale and token by token?

    python experiments/cost.py       minutes on a CPU; prints a table, writes out/cost.png

The same transformer (depth 8, width 512) draws n x n tokens scale by scale, where each side
is about a third larger than the last, and in raster order, scales=(1,) * n * n.
"""
import time

import numpy as np
import torch

from trial import drawing, quick_parser, run_main, show, transformer
from report import plots


def next_scale(n):
    """Sides from 1 to n, each about a third larger. 8 -> (1, 2, 3, 4, 6, 8)"""
    sides = [n]
    while sides[0] > 1:
        sides.insert(0, min(round(sides[0] / 4 * 3), sides[0] - 1))
    return tuple(sides)


@torch.no_grad()
def seconds(scales, depth, width, repeats):
    """The fastest of `repeats` times to draw the tokens of one image."""
    torch.manual_seed(0)
    config = transformer.VARConfig(scales=scales, depth=depth, width=width, heads=depth)
    var, times = transformer.VAR(config).eval(), []
    for _ in range(repeats):
        begin = time.perf_counter()
        conditioning, cache = var.conditioning(torch.tensor([3])), var.new_cache()
        for k, side in enumerate(scales):                  # the tokenizer is not measured
            inputs = torch.zeros(1, side * side, config.latent_dim)
            drawing.draw(var.step(k, inputs, conditioning, cache))
        times.append(time.perf_counter() - begin)
    return min(times)


def main():
    depth, width, sides = 8, 512, [8, 12, 16, 20, 24, 28, 32]
    if quick_parser(__doc__).parse_args().quick:
        depth, width, sides = 1, 64, [2, 3, 4]
    fast = [seconds(next_scale(n), depth, width, repeats=3) for n in sides]
    slow = [seconds((1,) * n * n, depth, width, repeats=1) for n in sides]
    lines = []
    for n, few, many in zip(sides, fast, slow):
        tokens, steps = sum(side * side for side in next_scale(n)), len(next_scale(n))
        lines.append([f"{n}", f"{tokens} and {n * n}", f"{steps} and {n * n}", f"{few:.3f}",
                      f"{many:.2f}", f"{many / few:.0f}x"])
    show(["n", "tokens, next scale and raster", "steps", "next scale, s", "raster, s",
          "ratio"], lines)
    curves = {}
    for order, times in (("raster order", slow), ("next scale", fast)):
        exponent = np.polyfit(np.log(sides), np.log(times), 1)[0]
        curves[f"{order}, n^{exponent:.1f}"] = list(zip(sides, times))
    plots.save_curve("out/cost.png", curves, x_label="n, side of the token map",
                     y_label="seconds per image")


if __name__ == "__main__":
    run_main(main)
