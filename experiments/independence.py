"""The tokens of one map are drawn independently: why do the two halves of a fish match?

    python experiments/independence.py       a table, and out/independence.png

Because the coarser maps have decided it. Here the first m token maps are those of a real image and
the rest is drawn by the model. PSNR compares with the image that all K real maps decode to.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.editing import m6, models_and_images                   # noqa: E402
from report import health, plots                                        # noqa: E402


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run", default="data/pretrained/shapes.pt", help="folder or shipped file")
    p.add_argument("--data-dir", default="")
    p.add_argument("--n", type=int, default=200, help="held-out images")
    p.add_argument("--cfg", type=float, default=0.0)
    p.add_argument("--out", default="out/independence.png")
    args = p.parse_args()
    tokenizer, var, image, labels = models_and_images(args.run, args.n, args.data_dir)
    tokens = tokenizer.image_to_tokens(image)
    own = tokenizer.tokens_to_image(tokens)
    some = slice(None, None, -(-len(image) // 10))                       # ten of them are shown
    rows, texts = [image[some], own[some]], ["original", "all maps real"]
    print("| maps that are real | tokens drawn | PSNR, dB |\n| --- | --- | --- |")
    for m in reversed(range(tokenizer.K)):
        keep = [torch.full((side * side,), k < m) for k, side in enumerate(tokenizer.scales)]
        painted = 2 * m6.generate(tokenizer, var, labels, cfg=args.cfg, tokens=tokens, keep=keep,
                                  generator=torch.Generator().manual_seed(0)) - 1
        db = float(health.psnr(painted, own).mean())
        name = f"up to {tokenizer.scales[m - 1]}x{tokenizer.scales[m - 1]}" if m else "none"
        print(f"| {name} | {sum(side * side for side in tokenizer.scales[m:])} | {db:.1f} |")
        rows.append(painted[some])
        texts.append(f"{name} real, {db:.1f} dB" if m else f"all drawn, {db:.1f} dB")
    plots.save_grid(args.out, (torch.cat(rows) + 1) / 2, len(rows[0]), row_labels=texts)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
