"""Does an edit keep what it should keep?

    python experiments/editing.py        prints a table, writes out/editing.png

All ways to edit get the same held-out shapes, classes, masks and random numbers, and the
shipped model. The numbers are the PSNR of the kept region in dB.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import shapes
from data.batches import rows_of, to_float
from engine.options import Parser, run_main
from experiments.trial import ROOT, drawing, show, training
from report import health, plots

# What is repainted: x0, y0, x1, y1 in fractions of the side.
MASKS = {"right half": (0.5, 0, 1, 1), "middle": (0.125, 0.125, 0.875, 0.875),
         "lower 40 %": (0, 0.6, 1, 1), "off the grid": (0.28, 0.22, 0.69, 0.66)}


def held_out_shapes(n):
    """-> the shipped tokenizer and transformer, n held-out shapes (n, 3, 32, 32) in [-1,
    1], their labels (n,)"""
    path = ROOT / "data/pretrained/shapes.pt"
    images, labels, _ = shapes.load("test")
    rows = rows_of(len(images), n)
    return (training.load_tokenizer(path)[0], training.load_transformer(path)[0],
            to_float(torch.from_numpy(images[rows])), torch.from_numpy(labels[rows]))


def keep_outside(box, side):
    """-> keep (side, side) bool: False in the box, which is in fractions of the side"""
    x0, y0, x1, y1 = (round(part * side) for part in box)
    keep = torch.ones(side, side, dtype=torch.bool)
    keep[y0:y1, x0:x1] = False
    return keep


@torch.no_grad()
def replay(tokenizer, var, image, keep, labels, *, generator, paint_passes=1,
           settle_passes=0, leak=False, **sampling):
    """Like edit(), but a kept token is that of the image, whatever is drawn around it. With
    one pass and the leak (the encoder sees hidden pixels) this is the paper's demo."""
    share = F.adaptive_avg_pool2d(keep.float()[None, None], tokenizer.scales[-1])
    kept_cells = (share >= 0.5).float()                                # (1, 1, h, w)
    kept = [tokenizer.downsample_to(kept_cells, k)[0, :, 0] >= 0.5
            for k in range(tokenizer.K)]
    composite, noise = image if leak else drawing.hide(image, keep), generator.get_state()
    for i in range(paint_passes + settle_passes):
        tokens = tokenizer.image_to_tokens(composite)
        if i < paint_passes:
            generator.set_state(noise)
            painted = drawing.generate(tokenizer, var, labels, tokens=tokens, keep=kept,
                                       generator=generator, **sampling)
        else:
            painted = (tokenizer.tokens_to_image(tokens) + 1) / 2
        composite = torch.where(keep, image, 2 * painted - 1)
    return painted


WAYS = {
    "tokenizer alone": (replay, dict(leak=True, paint_passes=0, settle_passes=1)),
    "replay, with the leak (the paper's demo)": (replay, dict(leak=True)),
    "replay, without the leak": (replay, {}),
    "replay in six passes": (replay, dict(paint_passes=6)),
    "replay, then two settling passes": (replay, dict(settle_passes=2)),
    "edit() in one pass": (drawing.edit, dict(paint_passes=1, settle_passes=0)),
    "edit() in six passes": (drawing.edit, dict(paint_passes=6, settle_passes=0)),
    "edit(), default: six passes and two settling": (drawing.edit, {}),
}


@torch.no_grad()
def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 images instead of 64")
    quick = parser.parse_args().quick
    tokenizer, var, image, labels = held_out_shapes(2 if quick else 64)
    keeps = {name: keep_outside(box, image.shape[-1]) for name, box in MASKS.items()}
    some, lines = slice(None, None, -(-len(image) // 8)), []
    kept = torch.where(keeps["middle"], (image + 1) / 2, 0.5)
    rows = {"kept\n(grey: to repaint)": kept[some]}
    for name, (way, options) in WAYS.items():
        lines.append([name])
        for mask, keep in keeps.items():
            result = way(tokenizer, var, image, keep, labels, cfg=1.5,
                         generator=torch.Generator().manual_seed(0), **options)
            db = health.psnr(2 * result - 1, image, keep).mean()
            lines[-1].append(f"{db:.1f}")
            if mask == "middle" and ("demo" in name or "default" in name):
                label = name.replace(" (", "\n(").replace(": ", ":\n")
                rows[f"{label}\nkept part: {db:.1f} dB"] = result[some]
    show([f"{len(image)} images, dB", *MASKS], lines)
    images = torch.cat(list(rows.values()))
    plots.save_grid("out/editing.png", images, len(images) // 3, row_labels=list(rows))
    print("wrote out/editing.png")


if __name__ == "__main__":
    run_main(main)
