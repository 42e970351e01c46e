"""Should every token count the same in the loss, although half of them are of the finest scale?

    python experiments/loss_weights.py --dataset shapes --steps 1200
    python experiments/loss_weights.py --data-dir DIR              three classes of CIFAR-10

Of 130 tokens 64 are of the last scale and one is of the first, which decides most of the image.
Three ways to weigh the cross-entropy of a token of a scale with side s, all with mean 1:

    per token    1          the paper, and the exact likelihood
    per scale    1 / s^2    every map counts as much as any other
    1 / side     1 / s      between the two (Infinity, Han et al. 2025)

Bits are the exact likelihood in every row, whatever was trained. Samples are drawn without
guidance from all codes. All other options: --help.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.trial import Trial, of_seeds, read_arguments, show  # noqa: E402
from engine.options import one_line  # noqa: E402
from report import plots  # noqa: E402

# Row -> chapter 5's setting side_power
POWERS = {"per token": 0, "1 / side": 1, "per scale": 2}


def main():
    args = read_arguments(__doc__, seeds=3)
    trial = Trial("loss_weights", args)
    tokenizer, lines, curves = trial.tokenizer(), [], {}
    for row, power in POWERS.items():
        found = [trial.row(row, seed, tokenizer, options=["--set", f"side_power={power}"], cfg=0.0)
                 for seed in trial.seeds]
        lines.append([row] + [of_seeds([f[key] for f in found], digits) for key, digits in (
            ("bits", 1), ("frechet", 3), ("precision", 3), ("recall", 3), ("in_class", 3))])
        scales = torch.tensor([f["bits_per_scale"] for f in found]).mean(0)
        curves[row] = [(side, float(b) / side ** 2) for side, b in zip(tokenizer.scales, scales)]
    floor = trial.measure("held-out", 0, trial.floor)
    lines.append(["held-out images", ""] + [f"{floor[key]:.3f}" for key in
                                            ("frechet", "precision", "recall")] + [""])
    show(["weight", "bits an image", "Fréchet", "precision", "recall", "in class"], lines,
         trial.headline())
    path = trial.folder / "loss_weights.png"
    plots.save_curve(path, curves, title="bits a token, by scale", x_label="side of the map")
    print("wrote", path)


if __name__ == "__main__":
    one_line(main)
