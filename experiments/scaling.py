"""Is the loss a power of the size? One transformer per size, all on the same tokens.

    python experiments/scaling.py --data-dir DIR --steps 1000        three classes of CIFAR-10
    python experiments/scaling.py --dataset shapes --steps 1200

VAR (Tian et al. 2024, section 4.2) reports that cross-entropy and error rate of held-out tokens
fall as powers of the number of parameters N, error = (b N)^-a, for all tokens and for those of the
last scale alone. Here the sizes span 1.5 orders of magnitude, and each model sees every view of an
image less than once (an image of CIFAR-10 about twice). In logarithms a power is a straight line,
so

    ln error = -a ln N + constant

is fitted by least squares: exponent a with its 95 % confidence interval (Student's t), and the
correlation of the two logarithms. Arithmetic: 6 operations a parameter of the blocks and the head,
a token and an image (forward and backward), plus 12 for each product of a query and a key entry.

Exponents depend on the data and on how far training has come; the paper's belong to ImageNet and to
models that were trained for hundreds of epochs.
"""
import math
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.trial import AT_ONCE, Trial, of_seeds, parameters  # noqa: E402
from experiments.trial import read_arguments, show  # noqa: E402
from engine.options import one_line  # noqa: E402
from report import plots  # noqa: E402

masking, drawing = import_module("03_block_causal_mask"), import_module("06_sample_and_edit")
SIZES = [(2, 32, 1), (2, 48, 1), (3, 64, 2), (3, 96, 3), (4, 128, 4), (5, 160, 5), (6, 192, 6)]
MEASURES = {"loss": "cross-entropy, all", "loss_last": "cross-entropy, last scale",
            "error": "error rate, all", "error_last": "error rate, last scale"}
PAPER = {"loss": 0.20, "loss_last": 0.23, "error": 0.010, "error_last": 0.016}   # section 4.2
# Student's t for a two-sided interval of 95 %, by degrees of freedom.
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}


def weigh(trial, tokenizer, var):
    """-> dict: nats and share of wrong tokens, of held-out images, over all scales and the last"""
    tokens, labels = trial.tokens(tokenizer)["test"]
    sizes, last = [side * side for side in tokenizer.scales], tokenizer.scales[-1] ** 2
    losses, wrong = [], []
    for rows in np.array_split(np.arange(len(labels)), -(-len(labels) // AT_ONCE)):
        target = torch.from_numpy(tokens[0, rows].astype(np.int64))
        logits = var(torch.from_numpy(labels[rows]), tokenizer.teacher_inputs(
            list(target.split(sizes, 1)))).float()
        losses.append(-logits.log_softmax(-1).gather(2, target[..., None])[..., 0])
        wrong.append((logits.argmax(-1) != target).double())
    loss, wrong = torch.cat(losses).double().mean(0), torch.cat(wrong).mean(0)       # (L,) each
    return dict(loss=float(loss.mean()), loss_last=float(loss[-last:].mean()),
                error=float(wrong.mean()), error_last=float(wrong[-last:].mean()))


def operations(var):
    """Floating-point operations of training on one image."""
    D, L = var.config.width, var.L
    weights = sum(p.numel() for block in var.blocks for name, p in block.named_parameters()
                  if p.dim() == 2 and "modulation" not in name) + var.head.weight.numel()
    pairs = int(masking.block_causal_mask(var.config.scales).sum())
    return 6 * L * weights + 12 * pairs * D * len(var.blocks)


def power_law(x, y):
    """Least squares in logarithms. -> exponent a of y = c x^-a, half of its 95 % interval,
    correlation"""
    u, v = np.log(x), np.log(y)
    slope, intercept = np.polyfit(u, v, 1)
    rest, free = v - (slope * u + intercept), len(u) - 2
    error = math.sqrt((rest ** 2).sum() / free / ((u - u.mean()) ** 2).sum())
    return -slope, STUDENT.get(free, 2.0) * error, np.corrcoef(u, v)[0, 1]


def main():
    trial = Trial("scaling", read_arguments(__doc__, steps=1000, seeds=1))
    tokenizer, lines, N, C = trial.tokenizer(), [], [], []
    means = {key: [] for key in MEASURES}
    for depth, width, heads in SIZES[:4] if trial.args.quick else SIZES:
        row, found = f"depth-{depth}-width-{width}", []
        options = ["--depth", str(depth), "--set", f"width={width}", f"heads={heads}"]
        for seed in trial.seeds:
            var = trial.train(row, seed, tokenizer, options)
            found.append(trial.measure(row, seed, lambda: weigh(trial, tokenizer, var)))
        N.append(parameters(var))
        C.append(operations(var) * trial.args.steps * trial.settings.batch_size / 1e12)
        for key in MEASURES:
            means[key].append(float(np.mean([f[key] for f in found])))
        lines.append([f"{depth} x {width}", f"{N[-1]:.3f}", f"{C[-1]:.1f}"] + [
            of_seeds([f[key] for f in found], 4) for key in MEASURES])
    show(["depth x width", "parameters, M", "arithmetic, TFLOP", *MEASURES.values()], lines,
         trial.headline())
    fits = []
    for key, name in MEASURES.items():
        a, half, correlation = power_law(N, means[key])
        by_c = power_law(C, means[key])
        fits.append([name, f"{a:.4f} ± {half:.4f}", f"{correlation:.4f}",
                     f"{by_c[0]:.4f} ± {by_c[1]:.4f}", f"{by_c[2]:.4f}", f"{PAPER[key]:.3f}"])
    show(["falls as", "exponent by parameters", "correlation", "exponent by arithmetic",
          "correlation", "VAR's, by parameters"], fits, "95 % intervals of the fit")
    path = trial.folder / "scaling.png"
    plots.save_curve(path, {name: list(zip(N, means[key])) for key, name in MEASURES.items()
                            if key.startswith("loss")}, log="x", x_label="parameters, M",
                     title="nats a token")
    print("wrote", path)


if __name__ == "__main__":
    one_line(main)
