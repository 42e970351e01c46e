"""The paper's ablation: from raster order to a next-scale model with all its parts.

    python experiments/ablation.py --data-dir DIR --steps 1200     three classes of CIFAR-10
    python experiments/ablation.py --dataset shapes --steps 1200

    raster          one 8x8 map, 64 tokens one after the other; the class is the first token
    next scale      six maps, 130 tokens in 6 steps; the class is still no more than that
    + AdaLN         the class steers every block
    + top-k 100     tokens are drawn from the likeliest fifth of the codes
    + guidance 1.5  as in the original code
    + q/k norm      queries and keys have length 1
    larger          more and wider blocks
    raster, all     raster order with all of this, except the size of "larger"
    raster, early   the same after as many steps, and images, as the other rows

From "next scale" to "larger" each row has all that the rows above it have, as in VAR (Tian
et al. 2024, section 5). "raster" and "raster, all" see twice as many images with half as
many tokens, so all rows except "larger" and the last one take equal arithmetic. Guidance
grows in equal steps over the maps, of which raster order has 64.
"""
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.options import run_main
from experiments.trial import (Trial, cells, drawing, parameters, training, transformer,
                               trial_parser)


class Raster(torch.nn.Module):
    """Makes a tokenizer of one 8x8 map look like one of 64 maps of a single token each. The
    mask of chapter 3 is then the triangle of raster order, and chapters 4 to 6 work as they
    are. The input of each token is the code of the token before it."""

    def __init__(self, tokenizer):
        super().__init__()
        side, config = tokenizer.scales[0], tokenizer.config
        self.tokenizer, self.decode = tokenizer, tokenizer.decode
        self.scales, self.K = (1,) * side ** 2, side ** 2
        self.config = SimpleNamespace(
            image_size=config.image_size, scales=self.scales, vocab_size=config.vocab_size,
            latent_dim=config.latent_dim)

    def image_to_tokens(self, image):
        """image (B, 3, H, W) -> 64 tokens (B, 1)"""
        return list(self.tokenizer.image_to_tokens(image)[0].split(1, 1))

    def features(self, tokens):
        return self.tokenizer.features([torch.cat(tokens, 1)])

    def teacher_inputs(self, tokens):
        """64 tokens (B, 1) -> the codes of all but the last (B, 63, C)"""
        return self.tokenizer.quantizer.lookup(torch.cat(tokens[:-1], 1))

    def next_input(self, k, f_hat, tokens_k):
        """There is no sum. -> (0, the code just drawn (B, 1, C); None after the last)"""
        return 0, self.tokenizer.quantizer.lookup(tokens_k) if k + 1 < self.K else None


class ClassToken(transformer.VAR):
    """The class is what the first map starts from and nothing else: the AdaLN vectors of a
    block are learned, but the same for all classes."""

    def __init__(self, config):
        super().__init__(config)
        del self.shared_modulation, self.head_modulation
        self.head_offset = torch.nn.Parameter(torch.zeros(1, 1, 2, config.width))

    def conditioning(self, labels):
        row = self.class_embed(labels)[:, None]                        # (B, 1, D)
        blocks = [block.modulation_offset for block in self.blocks]
        return transformer.Conditioning(row, blocks, self.head_offset)


# Row -> folder of its training run, order, class of the model, q/k norm, how it samples.
# Rows that differ only in sampling share a training run.
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


def milliseconds_alone(tokenizer, var, sampling, count=10):
    """Of the CPU, for an image that is drawn alone: steps then cost more than tokens. This
    is the median, because the first image is slow."""
    times = []
    for _ in range(count):
        begin = time.process_time()
        drawing.generate(tokenizer, var, torch.tensor([0]), **sampling)
        times.append(1000 * (time.process_time() - begin))
    return sorted(times)[count // 2]


def main():
    parser = trial_parser(__doc__, steps=3000, tokenizer_steps=12_000, n=3000, seeds=2)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    trial = Trial("ablation", parser.parse_args())
    tokenizers = {"raster": Raster(trial.train_tokenizer("raster", 0, scales=(8,))),
                  "next scale": training.load_tokenizer(trial.shipped)[0]}
    labels, lines, images = torch.arange(12) % len(trial.names), [], []
    for row in trial.args.rows:
        folder, order, model, qk_norm, sampling = ROWS[row]
        tokenizer, found = tokenizers[order], []
        changes = dict(shared_adaln=True, config=dict(qk_norm=qk_norm))
        if row == "larger":
            changes.update(depth=6, width=160, heads=5)
        if row in ("raster", "raster, all"):
            changes.update(steps=trial.args.steps * 130 // 64)
        for seed in trial.seeds:
            var = trial.train(folder, seed, tokenizer, model, **changes)
            found.append(trial.measure(f"{folder}/{row}", seed, lambda: dict(
                trial.judged(tokenizer, var, seed, **sampling),
                bits=trial.bits(tokenizer, var),
                alone=milliseconds_alone(tokenizer, var, sampling))))
        lines.append([row, f"{parameters(var):.2f}", *cells(found, dict(
            bits=1, frechet=2, precision=2, recall=2, in_class=0, ms=1, alone=0))])
        images.append(drawing.generate(tokenizer, var, labels, **sampling,
                                       generator=torch.Generator().manual_seed(0)))
    real = {"held-out images": trial.floor()}
    for order, tokenizer in tokenizers.items():
        rebuilt = trial.reconstructed(order, tokenizer)
        real[f"reconstructions, {order}, {rebuilt['psnr']:.1f} dB"] = rebuilt
    for name, found in real.items():
        numbers = cells([found], dict(frechet=2, precision=2, recall=2))
        lines.append([name, "", "", *numbers, "", "", ""])
    trial.show(["", "parameters, M", "bits per image", "Fréchet", "precision", "recall",
                "in class, %", "CPU ms per image, 100 at once", "alone"], lines)
    trial.draw(images, trial.args.rows, [trial.names[c] for c in labels])


if __name__ == "__main__":
    run_main(main)
