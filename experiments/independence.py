"""The tokens of one map are drawn independently: why do the two halves of a fish match?

    python experiments/independence.py       a table, and out/independence.png

Because the coarser maps have settled what both halves must agree on. Here the first m token
maps are those of a held-out shape, and the shipped model draws the rest. PSNR compares the
result with the image that all real maps decode to.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.editing import held_out_shapes
from experiments.trial import drawing, quick_parser, run_main, show
from report import health, plots


@torch.no_grad()
def main():
    quick = quick_parser(__doc__).parse_args().quick
    tokenizer, var, image, labels = held_out_shapes(10 if quick else 200)
    tokens = tokenizer.image_to_tokens(image)
    all_real = tokenizer.tokens_to_image(tokens)
    lines, rows = [], {"original": image, "all maps real": all_real}
    for m in reversed(range(tokenizer.K)):
        keep = [torch.full(map_k.shape[1:], k < m) for k, map_k in enumerate(tokens)]
        painted = drawing.generate(tokenizer, var, labels, cfg=0.0, tokens=tokens,
                                   keep=keep, generator=torch.Generator().manual_seed(0))
        db = float(health.psnr(2 * painted - 1, all_real).mean())
        side = tokenizer.scales[m - 1]
        name = f"up to {side}x{side}" if m else "none"
        drawn = sum(side * side for side in tokenizer.scales[m:])
        lines.append([name, f"{drawn}", f"{db:.1f}"])
        rows[f"{name} real, {db:.1f} dB"] = 2 * painted - 1
    show(["maps that are real", "tokens drawn", "PSNR, dB"], lines)
    images = torch.cat([row[::20] for row in rows.values()])
    plots.save_grid("out/independence.png", (images + 1) / 2, len(images) // len(rows),
                    row_labels=list(rows))


if __name__ == "__main__":
    run_main(main)
