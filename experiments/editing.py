"""Does an edit keep what it should keep, and does the new part fit it?

    python experiments/editing.py        prints a table, writes out/editing.png

All rows get the same held-out shapes, masks and random numbers. PSNR of the kept part; for
the right half also the bits of the result and how often a judge names the original's class.
"""
import math

import torch
import torch.nn.functional as F

from trial import ROOT, drawing, quick_parser, run_main, show, training
from data import shapes
from data.batches import rows_of, to_float
from report import health, judge, plots

# What is repainted of 32x32 pixels: x0, y0, x1, y1
MASKS = {"right half": (16, 0, 32, 32), "middle": (4, 4, 28, 28),
         "lower 40 %": (0, 19, 32, 32), "off the grid": (9, 7, 22, 21)}


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
    "edit(), default, no class (the paper's task)": (drawing.edit, {}),
    "edit(), default: six passes and two settling": (drawing.edit, {}),
}
SHOWN = (list(WAYS)[1], *list(WAYS)[-2:])                  # in the figure


def main():
    quick = quick_parser(__doc__).parse_args().quick
    images, classes, names = shapes.load("test" if quick else "train")
    network = judge.judge_of("shapes", images, classes, len(names), steps=3 if quick else None)
    path = ROOT / "data/pretrained/shapes.pt"
    tokenizer, var = training.load_tokenizer(path)[0], training.load_transformer(path)[0]
    images, classes, _ = shapes.load("test")
    chosen = rows_of(len(images), 2 if quick else 200)
    image, labels = torch.tensor(images[chosen]), torch.tensor(classes[chosen])
    image = to_float(image)
    lines, rows = [], {}
    for name, (way, options) in WAYS.items():
        given = torch.full_like(labels, len(names)) if "no class" in name else labels
        lines.append([name])
        for mask, (x0, y0, x1, y1) in MASKS.items():
            keep = torch.ones(32, 32, dtype=torch.bool)
            keep[y0:y1, x0:x1] = False
            result = way(tokenizer, var, image, keep, given, cfg=0.5,
                         generator=torch.Generator().manual_seed(0), **options)
            db = health.psnr(2 * result - 1, image, keep).mean()
            lines[-1].append(f"{db:.1f}")
            if mask == "right half":
                tokens = tokenizer.image_to_tokens(2 * result - 1)
                nats = -drawing.log_likelihood(tokenizer, var, tokens, labels).sum(1).mean()
                named = judge.accuracy(judge.extract(network, [result])[1], labels)
                hidden = [f"{nats / math.log(2):.0f}", f"{named:.0%}"]
            elif mask == "middle" and name in SHOWN:
                rows["kept (grey: to repaint)"] = torch.where(keep, (image + 1) / 2, 0.5)
                rows[f"{name}\n{db:.1f} dB"] = result
        lines[-1] += hidden
    show([f"{len(image)} images, dB", *MASKS, "bits, right half", "named as the original"],
         lines)
    plots.save_grid("out/editing.png", {text: row[::25] for text, row in rows.items()},
                    footer=f"dB: PSNR of the kept part, {len(image)} images.")


if __name__ == "__main__":
    run_main(main)
