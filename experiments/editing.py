"""Does an edit keep what it should, and does the seam show?

    python experiments/editing.py          the table of experiments/README.md, and out/editing.png

All ways to edit get the same images, classes, masks and noise. "dB" is the PSNR of the kept region.
"Seam" is the mean step across the edge of the mask over the mean step one pixel beside it: 1 is
invisible (the row "original" shows how close real images come to 1).
"""
import argparse
import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.batches import rows_of, sample_of, to_float                   # noqa: E402
from data.registry import load_data                                     # noqa: E402
from report import health, plots                                        # noqa: E402
from report.command_line import outside                                 # noqa: E402

m6 = import_module("06_sample_and_edit")
# What is repainted: x0, y0, x1, y1 in fractions of the side.
MASKS = {"right half": (0.5, 0, 1, 1), "middle": (0.125, 0.125, 0.875, 0.875),
         "lower 40 %": (0, 0.6, 1, 1), "off the grid": (0.28, 0.22, 0.69, 0.66)}


@torch.no_grad()
def replay(tokenizer, var, image, keep, labels, *, generator, paint_passes=1, settle_passes=0,
           leak=False, **sampling):
    """As edit(), but kept tokens are those of the image, whatever is drawn around them: with one
    pass and the leak (the encoder sees the hidden part) this is the paper's demo."""
    share = F.adaptive_avg_pool2d(keep.float()[None, None], tokenizer.scales[-1])
    kept_cells = (share >= 0.5).float()
    kept = [tokenizer.downsample_to(kept_cells, k)[0, :, 0] >= 0.5 for k in range(tokenizer.K)]
    composite, noise = image if leak else m6.hide(image, keep), generator.get_state()
    for _ in range(paint_passes):
        generator.set_state(noise)
        tokens = tokenizer.image_to_tokens(composite)
        painted = m6.generate(tokenizer, var, labels, tokens=tokens, keep=kept,
                              generator=generator, **sampling)
        composite = torch.where(keep, image, 2 * painted - 1)
    for _ in range(settle_passes):
        tokens = tokenizer.image_to_tokens(composite)
        painted = (tokenizer.tokens_to_image(tokens) + 1) / 2
        composite = torch.where(keep, image, 2 * painted - 1)
    return painted


ONE, SIX = dict(paint_passes=1, settle_passes=0), dict(paint_passes=6, settle_passes=0)
WAYS = {"replay, with the leak (the paper's demo)": (replay, dict(leak=True)),
        "replay, without the leak": (replay, {}),
        "replay in six passes": (replay, SIX),
        "replay, then two settling passes": (replay, dict(settle_passes=2)),
        "edit() in one pass": (m6.edit, ONE),
        "edit() in six passes": (m6.edit, SIX),
        "edit(), default: six passes and two settling": (m6.edit, {})}
SHOWN = {"replay, with the leak (the paper's demo)": "tokens replayed\n(the paper's demo)",
         "edit(), default: six passes and two settling": "edit() of chapter 6"}


def models_and_images(run, n, data_dir=""):
    """A run's folder, or a file of both models. -> tokenizer, var, some of the held-out images
    (n, 3, H, W) in [-1, 1], their labels (n,)"""
    files = [Path(run)] * 2 if Path(run).is_file() else [
        Path(run, f"{name}.pt") for name in ("tokenizer", "transformer")]
    tokenizer, about = m6.training.load_tokenizer(files[0])
    var, _ = m6.training.load_transformer(files[1])
    images, labels, _ = load_data(about["dataset"], "test", tokenizer.config.image_size, data_dir)
    labels = torch.from_numpy(labels[rows_of(len(images), n)])
    return tokenizer, var, to_float(sample_of(images, n)), labels


def kept_db(result, image, keep):
    """PSNR of the kept region in dB, mean over the images. result in [0, 1], image in [-1, 1]"""
    return float(health.psnr(2 * result - 1, image, keep).mean())


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


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run", default="data/pretrained/shapes.pt")
    p.add_argument("--data-dir", default="")
    p.add_argument("--n", type=int, default=64)
    p.add_argument("--cfg", type=float, default=1.5)
    p.add_argument("--picture", default="middle", choices=MASKS, help="the mask in editing.png")
    args = p.parse_args()
    tokenizer, var, image, labels = models_and_images(args.run, args.n, args.data_dir)
    original = (image + 1) / 2
    alone = (tokenizer.tokens_to_image(tokenizer.image_to_tokens(image)) + 1) / 2
    keeps = [outside(box, image.shape[-1]) for box in MASKS.values()]

    def cells(results):
        return " | ".join(f"{kept_db(result, image, keep):.1f} | {seam(result, keep):.2f}"
                          for result, keep in zip(results, keeps))
    shown = list(MASKS).index(args.picture)
    some = slice(None, None, -(-args.n // 8))              # eight images, evenly
    rows, texts = [torch.where(keeps[shown], original[some], 0.5)], ["kept\n(grey: to repaint)"]
    print(f"| {len(image)} images |" + "".join(f" {name}: dB | seam |" for name in MASKS))
    print("| --- |" + " --- | --- |" * len(MASKS))
    print("| original |" + "".join(f"  | {seam(original, keep):.2f} |" for keep in keeps))
    print(f"| tokenizer alone | {cells([alone] * len(keeps))} |")
    for name, (way, options) in WAYS.items():
        results = [way(tokenizer, var, image, keep, labels, cfg=args.cfg,
                       generator=torch.Generator().manual_seed(0), **options) for keep in keeps]
        print(f"| {name} | {cells(results)} |", flush=True)
        if name in SHOWN:
            rows.append(results[shown][some])
            texts.append(f"{SHOWN[name]}\n"
                         f"kept part: {kept_db(results[shown], image, keeps[shown]):.1f} dB")
    plots.save_grid("out/editing.png", torch.cat(rows), len(rows[0]), row_labels=texts)
    print("wrote out/editing.png")


if __name__ == "__main__":
    main()
