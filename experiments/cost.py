"""What does it cost to draw one image, scale by scale and token by token?

    python experiments/cost.py       minutes on a CPU; writes out/cost.png and prints a table

The same transformer draws n x n tokens both ways with cached keys and values, without guidance and
without the tokenizer's decoder: scale by scale, each side about a third larger than the last, and
in raster order, `scales=(1,) * n * n`. The paper's O(n^4) and O(n^6) count the query-key products
of attention without a cache; here they are counted with and without one.
"""
import argparse
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from report import plots  # noqa: E402

transformer, sampling = import_module("04_var_transformer"), import_module("06_sample_and_edit")


def next_scale(n):
    """Sides from 1 to n, each about a third larger. 8 -> (1, 2, 3, 4, 6, 8)"""
    sides = [n]
    while sides[0] > 1:
        sides.insert(0, min(round(sides[0] / 4 * 3), sides[0] - 1))
    return tuple(sides)


def products(scales, cached):
    """Query-key pairs. With a cache each new token looks once at all tokens so far; without one,
    every step computes all of them again."""
    blocks = np.array([side * side for side in scales], dtype=np.float64)
    so_far = blocks.cumsum()
    return float((blocks * so_far).sum() if cached else (so_far ** 2).sum())


@torch.no_grad()
def seconds(scales, depth, width, repeats):
    """The fastest of `repeats` times to draw the tokens of one image."""
    torch.manual_seed(0)
    var = transformer.VAR(transformer.VARConfig(scales=scales, depth=depth, width=width,
                                                heads=width // 64)).eval()
    times, label = [], torch.tensor([3])
    for _ in range(repeats):
        begin = time.perf_counter()
        conditioning, cache, inputs = var.conditioning(label), var.new_cache(), None
        for k, side in enumerate(scales):
            logits = var.step(k, inputs, conditioning, cache)
            token = sampling.draw(logits)
            if k + 1 < len(scales):                        # a table stands in for the tokenizer
                shown = torch.zeros(1, scales[k + 1] ** 2, var.config.latent_dim)
                inputs = shown + token.float().mean() / var.config.vocab_size
        times.append(time.perf_counter() - begin)
    return min(times)


def exponent(sides, values):
    """The p of values ~ sides ** p, by least squares on logarithms."""
    return float(np.polyfit(np.log(sides), np.log(values), 1)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[8, 12, 16, 20, 24, 28, 32])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="out/cost.png")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), depth {args.depth}, "
          f"width {args.width}\n| side | tokens | steps | next scale, s | raster, s | ratio |\n"
          + "| --- " * 6 + "|")
    scale, raster = [], []
    for n in args.sides:
        sides = next_scale(n)
        scale.append(seconds(sides, args.depth, args.width, args.repeats))
        raster.append(seconds((1,) * n * n, args.depth, args.width, max(1, args.repeats - 2)))
        print(f"| {n} | {sum(s * s for s in sides)} and {n * n} | {len(sides)} and {n * n} | "
              f"{scale[-1]:.3f} | {raster[-1]:.2f} | {raster[-1] / scale[-1]:.0f}x |", flush=True)
    print(f"seconds grow as n^{exponent(args.sides, scale):.1f} and "
          f"n^{exponent(args.sides, raster):.1f}")
    for cached in (True, False):
        grow = [exponent(args.sides, [products(layout(n), cached) for n in args.sides])
                for layout in (next_scale, lambda n: (1,) * n * n)]
        print(f"attention's products {'with' if cached else 'without'} a cache grow as "
              f"n^{grow[0]:.1f} and n^{grow[1]:.1f}")
    draw(args.out, args.sides, scale, raster)
    print(f"wrote {args.out}")


def draw(path, sides, scale, raster):
    """Both curves, with logarithmic axes."""
    lines = {f"raster order, n^{exponent(sides, raster):.1f}": list(zip(sides, raster)),
             f"next scale, n^{exponent(sides, scale):.1f}": list(zip(sides, scale))}
    plots.save_curve(path, lines, log="xy", y_label="seconds per image",
                     x_label="n, side of the token map")


if __name__ == "__main__":
    main()
