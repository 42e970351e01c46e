"""The paper's ablation: from raster order to a next-scale model with all its parts.

    python experiments/ablation.py --data-dir DIR --steps 1200     three classes of CIFAR-10

Raster order draws 64 tokens, one after the other, from a tokenizer with one 8x8 map; next
scale draws six maps, 130 tokens. From "next scale" to "larger" each row has all that the
rows above it have (VAR, Tian et al. 2024, section 5). "raster" and "raster, all" see twice
as many images, so all rows except "larger" and the last one take equal arithmetic.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.order import Reordered, one_by_one
from experiments.trial import (Trial, cells, drawing, parameters, run_main, training,
                               transformer, trial_parser)


class ClassToken(transformer.VAR):
    """Only the first map's input depends on the class; AdaLN vectors do not."""

    def __init__(self, config):
        super().__init__(config)
        del self.shared_modulation, self.head_modulation
        self.head_offset = torch.nn.Parameter(torch.zeros(1, 1, 2, config.width))

    def conditioning(self, labels):
        row = self.class_embed(labels)[:, None]                        # (B, 1, D)
        blocks = [block.modulation_offset for block in self.blocks]
        return transformer.Conditioning(row, blocks, self.head_offset)


# Row -> folder of its training run, order, class of the model, q/k norm, how it samples
PLAIN, TOP_K, GUIDED = dict(cfg=0.0), dict(cfg=0.0, top_k=100), dict(cfg=1.5, top_k=100)
ROWS = {
    "raster": ("raster", "raster", ClassToken, False, PLAIN),
    "next scale": ("next-scale", "next scale", ClassToken, False, PLAIN),
    "+ AdaLN": ("adaln", "next scale", transformer.VAR, False, PLAIN),
    "+ top-k 100": ("adaln", "next scale", transformer.VAR, False, TOP_K),
    "+ guidance 1.5": ("adaln", "next scale", transformer.VAR, False, GUIDED),
    "+ q/k norm": ("qk-norm", "next scale", transformer.VAR, True, GUIDED),
    "larger": ("larger", "next scale", transformer.VAR, True, GUIDED),
    "raster, all": ("raster-all", "raster", transformer.VAR, True, GUIDED),
    "raster, early": ("raster-early", "raster", transformer.VAR, True, GUIDED),
}


def milliseconds_alone(tokenizer, var, sampling):
    """The median CPU time of an image drawn alone, because the first one is slow."""
    times = []
    for _ in range(10):
        begin = time.process_time()
        drawing.generate(tokenizer, var, torch.tensor([0]), **sampling)
        times.append(1000 * (time.process_time() - begin))
    return sorted(times)[5]


def main():
    parser = trial_parser(__doc__, steps=3000, tokenizer_steps=12_000, n=3000, seeds=2)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    trial = Trial("ablation", parser.parse_args())
    one_map = trial.train_tokenizer("raster", 0, scales=(8,))
    tokenizers = {"raster": Reordered(one_map, one_by_one((8,)), by_map=False),
                  "next scale": training.load_tokenizer(trial.shipped)[0]}
    labels, lines, images = torch.arange(12) % len(trial.names), [], []
    digits = dict(bits=1, frechet=2, precision=2, recall=2, in_class=0, ms=1, alone=0)
    for row in trial.args.rows:
        folder, order, model, qk_norm, sampling = ROWS[row]
        tokenizer, found, changes = tokenizers[order], [], {}
        if row == "larger":
            changes.update(depth=6, width=160, heads=5)
        if row in ("raster", "raster, all"):
            changes.update(steps=trial.args.steps * 130 // 64)
        for seed in trial.seeds:
            var = trial.train(folder, seed, tokenizer, model, dict(qk_norm=qk_norm),
                              shared_adaln=True, **changes)
            found.append(trial.measure(f"{folder}/{row}", seed, lambda: dict(
                trial.judged(tokenizer, var, seed, **sampling),
                bits=trial.bits(tokenizer, var),
                alone=milliseconds_alone(tokenizer, var, sampling))))
        lines.append([row, f"{parameters(var):.2f}", *cells(found, digits)])
        images.append(drawing.generate(tokenizer, var, labels, **sampling,
                                       generator=torch.Generator().manual_seed(0)))
    lines.append(["held-out images", "", *cells([trial.floor()], digits)])
    for order, tokenizer in dict(tokenizers, raster=one_map).items():
        rebuilt = trial.reconstructed(order, tokenizer)
        name = f"reconstructions, {order}, {rebuilt['psnr']:.1f} dB"
        lines.append([name, "", *cells([rebuilt], digits)])
    trial.show(["", "parameters, M", "bits per image", "Fréchet", "precision", "recall",
                "in class, %", "CPU ms per image, 100 at once", "alone"], lines)
    trial.draw(images, trial.args.rows, [trial.names[c] for c in labels])


if __name__ == "__main__":
    run_main(main)
