"""Is the loss a power of the size? One transformer per size, all on the same tokens.

    python experiments/scaling.py --data-dir DIR --steps 1000      three classes of CIFAR-10

VAR (Tian et al. 2024, section 4.2) reports that cross-entropy and error rate of held-out
tokens fall as powers of the number of parameters N. As the entropy of a token is not zero,
the fit here has a third parameter: loss = E + c N^-a. (E also holds what a model of any
size would not learn in so few steps.)
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.trial import Trial, parameters, run_main, show, training, trial_parser
from report import plots

# Depth, width, heads
SIZES = [(2, 32, 1), (2, 48, 1), (3, 64, 2), (3, 96, 3), (4, 128, 4), (5, 160, 5),
         (6, 192, 6)]
MEASURES = ("cross-entropy, all scales", "cross-entropy, last scale",
            "error rate, all scales", "error rate, last scale")


def held_out(trial, tokenizer, var):
    """-> dict: nats per token and share of wrong tokens, over all scales and the last"""
    found, last = [], tokenizer.scales[-1] ** 2
    for tokens, classes in trial.held_out(tokenizer, trial.settings.precision):
        nats, right = training.token_losses(var, tokenizer, torch.cat(tokens, 1), classes)
        found.append(torch.stack([nats, 1 - right.float()], 1))        # (B, 2, L)
    loss, error = torch.cat(found).double().mean(0)                    # (L,) each
    numbers = loss.mean(), loss[-last:].mean(), error.mean(), error[-last:].mean()
    return dict(zip(MEASURES, map(float, numbers)))


def fit(N, losses, most):
    """losses = E + c N^-a: for each E from 0 to `most` a line through the logarithms,
    then the E of least squared error -> E, c, a, correlation of the logarithms"""
    found = []
    for E in np.linspace(0, most, 1000):
        x, y = np.log(N), np.log(losses - E)
        slope, intercept = np.polyfit(x, y, 1)
        error = np.square(losses - E - np.exp(intercept + slope * x)).sum()
        found.append((error, E, np.exp(intercept), -slope, np.corrcoef(x, y)[0, 1]))
    return min(found)[1:]


def compare(path, N, columns):
    """Print the fits and draw those of cross-entropies. columns: {measure: losses (n,)}"""
    lines, points, curves, x = [], {}, {}, np.geomspace(N.min(), N.max(), 100)
    for name, losses in columns.items():
        E, c, a, r = fit(N, losses, 0.999 * losses.min())
        pure = fit(N, losses, 0)[3]
        lines.append([name, f"{E:.3f}", f"{a:.2f}", f"{r:.3f}", f"{pure:.3f}"])
        kind, _, where = name.partition(", ")
        if kind == "cross-entropy":
            text = f"{where}: {E:.2f} + {c:.2f} N^-{a:.2f}"
            points[text] = np.stack([N, losses], 1)
            curves[text] = np.stack([x, E + c * x ** -a], 1)
    show(["falls as E + c N^-a", "E", "a", "correlation", "if E = 0"], lines)
    plots.save_curve(path, points, curves, x_label="N, millions of parameters",
                     y_label="held-out cross-entropy, nats per token; lines: E + c N^-a")
    print(f"wrote {path}")


def main():
    trial = Trial("scaling", trial_parser(__doc__, steps=1000, seeds=1).parse_args())
    tokenizer, _ = training.load_tokenizer(trial.shipped)
    rows, means = {}, []
    for depth, width, heads in SIZES[:4] if trial.args.quick else SIZES:
        row = f"{depth} x {width}"
        rows[row] = []
        for seed in trial.seeds:
            var = trial.train(row, seed, tokenizer, depth=depth, width=width, heads=heads)
            found = trial.measure(row, seed, lambda: held_out(trial, tokenizer, var))
            rows[row].append(dict(found, N=parameters(var)))
        means.append(np.mean([list(numbers.values()) for numbers in rows[row]], 0))
    trial.show("depth x width", {"parameters, M": ("N", 3)}
               | {name: (name, 4) for name in MEASURES}, rows)
    print()
    *losses, N = np.transpose(means)
    compare(trial.folder / "scaling.png", N, dict(zip(MEASURES, losses)))


if __name__ == "__main__":
    run_main(main)
