"""Is the loss a power of the size? One transformer per size, all on the same tokens.

    python experiments/scaling.py --data-dir DIR --steps 1000      three classes of CIFAR-10

VAR (Tian et al. 2024, section 4.2) reports that the cross-entropy of held-out tokens falls
as a power of the number of parameters N. The entropy of a token is not zero, so E + c N^-a
is fitted here. (E also holds what no size learns in so few steps.)
"""
import math

import numpy as np

from trial import Trial, parameters, run_main, show, training, trial_parser
from report import plots

# Depth, width, heads
SIZES = [(2, 32, 1), (2, 48, 1), (3, 64, 2), (3, 96, 3), (4, 128, 4), (5, 160, 5),
         (6, 192, 6)]


def fit(N, losses):
    """losses = E + c N^-a: for each E a line through the logarithms, then the E of least
    squared error -> E, c, a, correlation of the logarithms, the same if E = 0"""
    found = []
    for E in np.linspace(0, losses.min(), 1000, endpoint=False):
        x, y = np.log(N), np.log(losses - E)
        slope, intercept = np.polyfit(x, y, 1)
        error = np.square(losses - E - np.exp(intercept + slope * x)).sum()
        found.append((error, E, np.exp(intercept), -slope, np.corrcoef(x, y)[0, 1]))
    return *min(found)[1:], found[0][-1]


def main():
    trial = Trial("scaling", trial_parser(__doc__, steps=1000, seeds=1).parse_args())
    tokenizer, _ = training.load_tokenizer(trial.shipped)
    rows = {}
    for depth, width, heads in SIZES[:4] if trial.args.quick else SIZES:
        row = f"{depth} x {width}"
        rows[row] = []
        for seed in trial.seeds:
            var = trial.train(row, seed, tokenizer, depth=depth, width=width, heads=heads)
            bits = trial.measure(row, seed, lambda: dict(bits=trial.bits(tokenizer, var)))
            nats = math.log(2) * np.array(bits["bits"])                # (K,)
            rows[row].append({"N": parameters(var), "all scales": nats.sum() / var.L,
                              "last scale": nats[-1] / tokenizer.scales[-1] ** 2})
    trial.show("depth x width", {"parameters, M": ("N", 3), "all scales": ("all scales", 4),
                                 "last scale": ("last scale", 4)}, rows)
    lines, dots, curves = [], {}, {}
    for name in ("all scales", "last scale"):
        pairs = [(one["N"], one[name]) for found in rows.values() for one in found]
        N, losses = np.transpose(pairs)
        E, c, a, r, pure = fit(N, losses)
        lines.append([name, f"{E:.3f}", f"{c:.3f}", f"{a:.2f}", f"{r:.3f}", f"{pure:.3f}"])
        text = f"{name}: {E:.2f} + {c:.2f} N^-{a:.2f}"
        dots[text] = pairs
        curves[text] = [(x, E + c * x ** -a) for x in np.geomspace(N.min(), N.max(), 100)]
    print()
    show(["falls as E + c N^-a", "E", "c", "a", "correlation", "if E = 0"], lines)
    plots.save_curve(trial.folder / "scaling.png", dots, curves,
                     x_label="N, millions of parameters",
                     y_label="held-out cross-entropy, nats per token; lines: E + c N^-a")


if __name__ == "__main__":
    run_main(main)
