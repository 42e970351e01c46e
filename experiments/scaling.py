"""Is the loss a power of the size? One transformer per size, all on the same tokens.

    python experiments/scaling.py --data-dir DIR --steps 1000      three classes of CIFAR-10
    python experiments/scaling.py --dataset shapes --steps 1200

VAR (Tian et al. 2024, section 4.2) reports that cross-entropy and error rate of held-out
tokens fall as powers of the number of parameters, over all tokens and over those of the
last scale: error = (b N)^-a, so ln error = -a ln N + constant. This line is fitted by least
squares; the table has the exponent a with its 95 % confidence interval (Student's t) and
the correlation of the logarithms. Exponents depend on the data and on how far training has
come: the paper's belong to ImageNet and to hundreds of epochs.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.trial import (AT_ONCE, CPU, Trial, cells, parameters, run_main, show,
                               training, trial_parser)
from report import plots

# Depth, width, heads
SIZES = [(2, 32, 1), (2, 48, 1), (3, 64, 2), (3, 96, 3), (4, 128, 4), (5, 160, 5),
         (6, 192, 6)]
# What is measured -> its name, and the paper's exponent (section 4.2)
MEASURES = {"loss": ("cross-entropy, all", 0.200),
            "loss_last": ("cross-entropy, last scale", 0.230),
            "error": ("error rate, all", 0.010),
            "error_last": ("error rate, last scale", 0.016)}
STUDENT = {2: 4.303, 5: 2.571}            # 95 %, two-sided, by degrees of freedom


def held_out(trial, tokenizer, var):
    """-> dict: nats per token and share of wrong tokens, over all scales and the last
    one"""
    (views, labels), found = trial.tokens(tokenizer)["test"], []
    for rows in np.array_split(np.arange(len(labels)), 1 + len(labels) // AT_ONCE):
        tokens, classes = training.cached_rows(views, labels, rows, CPU)
        nats, right = training.token_losses(var, tokenizer, tokens, classes)
        found.append(torch.stack([nats, 1 - right.float()], 1))        # (B, 2, L)
    loss, error = torch.cat(found).double().mean(0)                    # (L,) each
    last = tokenizer.scales[-1] ** 2
    return dict(loss=float(loss.mean()), loss_last=float(loss[-last:].mean()),
                error=float(error.mean()), error_last=float(error[-last:].mean()))


def main():
    trial = Trial("scaling", trial_parser(__doc__, steps=1000, seeds=1).parse_args())
    tokenizer, _ = training.load_tokenizer(trial.shipped)
    lines, fits, sizes, curves, means = [], [], [], {}, {key: [] for key in MEASURES}
    for depth, width, heads in SIZES[:4] if trial.args.quick else SIZES:
        row, found = f"{depth} x {width}", []
        for seed in trial.seeds:
            var = trial.train(row, seed, tokenizer, depth=depth, width=width, heads=heads)
            found.append(trial.measure(row, seed, lambda: held_out(trial, tokenizer, var)))
        sizes.append(parameters(var))
        lines.append([row, f"{sizes[-1]:.3f}", *cells(found, dict.fromkeys(MEASURES, 4))])
        for key in MEASURES:
            means[key].append(float(np.mean([numbers[key] for numbers in found])))
    for key, (name, paper) in MEASURES.items():
        x, y = np.log(sizes), np.log(means[key])
        (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
        half = STUDENT[len(x) - 2] * np.sqrt(covariance[0, 0])
        fits.append([name, f"{-slope:.4f} ± {half:.4f}", f"{np.corrcoef(x, y)[0, 1]:.4f}",
                     f"{paper:.3f}"])
        if key in ("loss", "loss_last"):
            fit = np.exp(intercept + slope * x)
            curves[name] = list(zip(sizes, means[key]))
            curves[f"best power, N^{slope:.3f}"] = list(zip(sizes, fit.tolist()))
    trial.show(["depth x width", "parameters, M", *(name for name, _ in MEASURES.values())],
               lines)
    print()
    show(["falls as", "exponent by parameters", "correlation", "VAR's exponent"], fits)
    # Both axes are logarithmic, so a power is a straight line.
    path = trial.folder / "scaling.png"
    plots.save_curve(path, curves, log="xy", x_label="N, millions of parameters",
                     y_label="held-out cross-entropy, nats per token")
    print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
