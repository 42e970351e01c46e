"""Is the loss a power of the size? One transformer per size, all on the same tokens.

    python experiments/scaling.py --data-dir DIR --steps 1000      three classes of CIFAR-10

VAR (Tian et al. 2024, section 4.2) reports that cross-entropy and error rate of held-out
tokens fall as powers of the number of parameters: ln error = -a ln N + constant, fitted
here by least squares. The table has a with its 95 % confidence interval (Student's t) and
the correlation of the logarithms. The paper's exponents belong to ImageNet.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.trial import (Trial, cells, parameters, run_main, show, training,
                               trial_parser)
from report import plots

# Depth, width, heads
SIZES = [(2, 32, 1), (2, 48, 1), (3, 64, 2), (3, 96, 3), (4, 128, 4), (5, 160, 5),
         (6, 192, 6)]
# What is measured -> the paper's exponent (section 4.2)
MEASURES = {"cross-entropy, all": 0.200, "cross-entropy, last scale": 0.230,
            "error rate, all": 0.010, "error rate, last scale": 0.016}
STUDENT = {2: 4.303, 5: 2.571}            # 95 %, two-sided, by degrees of freedom


def held_out(trial, tokenizer, var):
    """-> dict: nats per token and share of wrong tokens, over all scales and the last"""
    found, last = [], tokenizer.scales[-1] ** 2
    for tokens, classes in trial.held_out(tokenizer, trial.settings.precision):
        nats, right = training.token_losses(var, tokenizer, torch.cat(tokens, 1), classes)
        found.append(torch.stack([nats, 1 - right.float()], 1))        # (B, 2, L)
    loss, error = torch.cat(found).double().mean(0)                    # (L,) each
    numbers = loss.mean(), loss[-last:].mean(), error.mean(), error[-last:].mean()
    return dict(zip(MEASURES, map(float, numbers)))


def main():
    trial = Trial("scaling", trial_parser(__doc__, steps=1000, seeds=1).parse_args())
    tokenizer, _ = training.load_tokenizer(trial.shipped)
    lines, points, fits, curves = [], [], [], {}
    for depth, width, heads in SIZES[:4] if trial.args.quick else SIZES:
        row, found = f"{depth} x {width}", []
        for seed in trial.seeds:
            var = trial.train(row, seed, tokenizer, depth=depth, width=width, heads=heads)
            found.append(trial.measure(row, seed, lambda: held_out(trial, tokenizer, var)))
        lines.append([row, f"{parameters(var):.3f}",
                      *cells(found, dict.fromkeys(MEASURES, 4))])
        means = np.mean([list(numbers.values()) for numbers in found], 0)
        points.append([parameters(var), *means])
    sizes, *columns = np.transpose(points)
    for (name, paper), values in zip(MEASURES.items(), columns):
        x, y = np.log(sizes), np.log(values)
        (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
        half = STUDENT[len(x) - 2] * np.sqrt(covariance[0, 0])
        fits.append([name, f"{-slope:.4f} ± {half:.4f}", f"{np.corrcoef(x, y)[0, 1]:.4f}",
                     f"{paper:.3f}"])
        if name.startswith("cross-entropy"):
            curves[name] = list(zip(sizes, values))
            fit = np.exp(intercept + slope * x)
            curves[f"{name}, N^{slope:.3f}"] = list(zip(sizes, fit))
    trial.show(["depth x width", "parameters, M", *MEASURES], lines)
    print()
    show(["falls as", "exponent by parameters", "correlation", "VAR's exponent"], fits)
    path = trial.folder / "scaling.png"
    plots.save_curve(path, curves, x_label="N, millions of parameters",
                     y_label="held-out cross-entropy, nats per token")
    print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
