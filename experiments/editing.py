"""Kept stays kept? How true the kept part of an edited picture stays, and whether the seam shows.

    python experiments/editing.py                       the table of the README, and a picture

Same pictures, classes, masks and random numbers for every way. "True" is the PSNR of the kept
region; "seam" the step across the mask's edge divided by the steps one pixel beside it, where 1 is
invisible (real pictures: the row "original").
"""
import argparse
import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from report import plots                                               # noqa: E402
from data.batches import load_data, sample_of, rows_of, to_float        # noqa: E402

MASKS = {"right half": (0.5, 0, 1, 1), "middle": (0.125, 0.125, 0.875, 0.875),
         "lower 40 %": (0, 0.6, 1, 1), "off the grid": (0.28, 0.22, 0.69, 0.66)}
WAYS = {"replay (the paper's way, without its leak)": dict(replay=True, looks=(1, 0)),
        "rounded again, one look": dict(looks=(1, 0)),
        "rounded again, six looks": dict(looks=(6, 0)),
        "six looks, tokens replayed": dict(replay=True, looks=(6, 0)),
        "replay, then two looks of the tokenizer": dict(replay=True, looks=(1, 2)),
        "default: six looks, then two of the tokenizer": dict()}


def kept_db(result, original, keep):
    """PSNR of the kept region in dB, mean over the pictures. All in [0, 1]"""
    return float(-10 * (result - original).square()[:, :, keep].mean((1, 2)).log10().mean())


def seam(image, keep):
    """Mean step across the edge of the mask over the mean step one pixel to either side of it."""
    across, beside = [], []
    for axis in (-1, -2):
        step = image.diff(dim=axis).abs().mean(1)                            # (B, ...)
        edge = keep.int().diff(dim=axis) != 0
        shifted = [edge.roll(by, axis) for by in (1, -1)]
        shifted[0].select(axis, 0).fill_(False)
        shifted[1].select(axis, -1).fill_(False)
        across.append(step[:, edge])
        beside.append(step[:, (shifted[0] | shifted[1]) & ~edge])
    return float(torch.cat(across, 1).mean() / torch.cat(beside, 1).mean())


def leaky(m6, tokenizer, var, image, keep, labels, **how):
    """The paper's demo: tokens of the whole picture, hidden part included, replayed where kept."""
    whole = F.adaptive_avg_pool2d(keep.float()[None, None], tokenizer.scales[-1])
    known = (whole >= 0.5).float()
    kept = [tokenizer.look_at(known, k)[0, :, 0] >= 0.5 for k in range(tokenizer.K)]
    return m6.generate(tokenizer, var, labels, tokens=tokenizer.image_to_tokens(image), keep=kept,
                       **how)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run", default="data/pretrained/shapes.pt")
    p.add_argument("--data-dir", default="")
    p.add_argument("--n", type=int, default=64)
    p.add_argument("--cfg", type=float, default=1.5)
    args = p.parse_args()
    m6, path = import_module("06_sample_and_edit"), Path(args.run)
    one = path.is_file()
    tokenizer, about = m6.training.load_tokenizer(path if one else path / "tokenizer.pt")
    var, _ = m6.training.load_transformer(path if one else path / "transformer.pt")
    side = tokenizer.config.image_size
    images, labels, _ = load_data(about["dataset"], "test", side, args.data_dir)
    image = to_float(sample_of(images, args.n))
    labels = torch.from_numpy(labels[rows_of(len(images), args.n)])
    original = (image + 1) / 2
    alone = (tokenizer.tokens_to_image(tokenizer.image_to_tokens(image)) + 1) / 2
    columns = "".join(f" {name}: dB | seam |" for name in MASKS)
    print(f"| {len(image)} pictures |{columns}\n| --- |{' --- | --- |' * len(MASKS)}")
    shown = {}
    ways = {"original": lambda keep: original, "tokenizer alone": lambda keep: alone,
            "replay, with the leak (the paper's demo)": lambda keep: leaky(
                m6, tokenizer, var, image, keep, labels, cfg=args.cfg,
                generator=torch.Generator().manual_seed(0))}
    for name, how in WAYS.items():
        ways[name] = lambda keep, how=how: m6.edit(
            tokenizer, var, image, keep, labels, cfg=args.cfg,
            generator=torch.Generator().manual_seed(0), **how)
    for name, way in ways.items():
        cells = []
        for mask, box in MASKS.items():
            keep = torch.ones(side, side, dtype=torch.bool)
            x0, y0, x1, y1 = (round(v * side) for v in box)
            keep[y0:y1, x0:x1] = False
            with torch.no_grad():
                result = way(keep)
            db = "" if result is original else f"{kept_db(result, original, keep):.1f}"
            cells += [db, f"{seam(result, keep):.2f}"]
            skip = ("tokenizer", "six looks, t", "replay, t")
            if mask == "middle" and not name.startswith(skip):
                shown[name] = result[:8]
                shown.setdefault("kept", torch.where(keep, original[:8], 0.5))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    rows = ["original", "kept", *[name for name in shown if name not in ("original", "kept")]]
    plots.save_grid("out/editing.png", torch.cat([shown[name] for name in rows]), 8,
                       row_labels=rows)
    print("wrote out/editing.png")


if __name__ == "__main__":
    main()
