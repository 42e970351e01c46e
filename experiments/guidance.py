"""At which scales does guidance pay: as a ramp or at equal strength, and until which scale?

    python experiments/guidance.py --data-dir DIR          three classes of CIFAR-10
    python experiments/guidance.py --dataset shapes

A guided scale goes through the transformer twice, for the class and without one. After the last
guided scale the half without a class is dropped: chapter 6 does so by itself when it is handed
strengths that end in zeros. Half of all tokens belong to the last scale, so to guide only the first
maps costs little more than not to guide at all:

                             1x1  2x2  3x3  4x4  6x6  8x8   tokens computed for an image
    none                      0    0    0    0    0    0    130
    ramp 3                    0   .6  1.2  1.8  2.4    3    260, as in the paper's code
    constant 3                3    3    3    3    3    3    260
    constant 3, off from 4x4  3    3    3    0    0    0    144
    constant 3, on from 4x4   0    0    0    3    3    3    260: the first maps fill the cache
    constant 1.5            1.5  1.5  1.5  1.5  1.5  1.5    260: on the average the ramp's strength

Nothing is trained. All rows draw from the shipped model with its own top-p, with the same labels
and, seed by seed, the same random numbers. That top-p was chosen for the model's own ramp, cfg 3 on
CIFAR-10. Seconds are of the CPU, the tokenizer's decoder included.

Shapes: strengths t, a list of K numbers; samples (n, 3, 32, 32).

Sources: the ramp is that of the code of VAR (Tian et al. 2024). Guidance in a part of the steps
alone: Kynkäänniemi et al. 2024, for diffusion. Without guidance at the large scales: Switti
(Voronov et al. 2024), a text-to-image VAR.
"""
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.trial import ROOT, Trial, of_seeds, read_arguments, show  # noqa: E402
from engine.checkpoints import model_fingerprint  # noqa: E402
from engine.options import number, one_line  # noqa: E402
from report import plots  # noqa: E402

training, drawing = import_module("05_train"), import_module("06_sample_and_edit")
STRENGTHS = {"cifar10": (1.5, 3.0), "shapes": (0.5, 1.5)}


def first(t, count):
    """The strengths t, switched off after `count` scales."""
    return [*t[:count], *[0.0] * (len(t) - count)]


def schedules(cfgs, scales):
    """-> {curve: {row: K strengths}}. A curve is one way to guide: all scales, then ever fewer. The
    curve "others" is the largest strength without the first scales, and that ramp's mean."""
    K, curves = len(scales), {}
    for cfg in cfgs:
        for name, t in (("ramp", drawing.strengths(cfg, K)), ("constant", [cfg] * K)):
            curve = curves[f"{name} {cfg:g}"] = {f"{name} {cfg:g}": t}
            for k in range(K - 1, 0, -1):
                if any(t[:k]):
                    side = f"{scales[k]}x{scales[k]}"
                    curve[f"{name} {cfg:g}, off from {side}"] = first(t, k)
    others, most = {}, max(cfgs)
    for k in range(1, K):
        others[f"constant {most:g}, on from {scales[k]}x{scales[k]}"] = [0.0] * k + [most] * (K - k)
    if most / 2 not in cfgs:
        others[f"constant {most / 2:g}"] = [most / 2] * K
    return {**curves, "others": others}


def tokens_computed(t, scales):
    """Tokens that go through the transformer for an image: twice as many up to the last guided
    scale, even where t is 0: without a class, too, it needs the cached keys and values."""
    last = max((k for k in range(len(t)) if t[k] > 0), default=-1)
    return sum(side * side * (2 if k <= last else 1) for k, side in enumerate(scales))


def line_of(row, t, scales, found):
    """A line of the table. found: what each seed found"""
    return [row, f"{tokens_computed(t, scales)}"] + [
        of_seeds([f[key] * factor for f in found], digits)
        for key, factor, digits in (("seconds", 1000, 1), ("frechet", 1, 3), ("precision", 1, 3),
                                    ("recall", 1, 3), ("in_class", 1, 3))]


def main():
    args = read_arguments(__doc__, steps=0, more=[("--cfg", dict(
        type=number(float, 0.01), nargs="+", help="strengths [cifar10: 1.5 3; shapes: 0.5 1.5]"))])
    trial = Trial("guidance", args)
    tokenizer = trial.tokenizer()
    var, about = training.load_transformer(ROOT / "data" / "pretrained" / f"{args.dataset}.pt")
    sampling = {key: about["sampling"][key] for key in ("top_k", "top_p")}
    scales, lines, curves, model = tokenizer.scales, [], {}, model_fingerprint(var)

    def measured(row, t):
        """Adds the row to the table. -> its point (milliseconds, Fréchet) in the figure"""
        found = [trial.measure(row, seed, lambda: trial.judged(tokenizer, var, seed, cfg=t,
                                                               **sampling), model=model, **sampling)
                 for seed in trial.seeds]
        lines.append(line_of(row, t, scales, found))
        # Other programs can only slow down a drawing.
        return (1000 * min(f["seconds"] for f in found),
                sum(f["frechet"] for f in found) / len(found))

    without = measured("none", [0.0] * len(scales))
    for name, rows in schedules(sorted(set(args.cfg or STRENGTHS[args.dataset])), scales).items():
        curves[name] = [*(measured(row, t) for row, t in rows.items()), without]
    del curves["others"]                                   # one cost, so no curve
    for row, compute in (("held-out images", trial.floor),
                         ("their reconstructions", lambda: trial.reconstructed(tokenizer))):
        found = trial.measure(row, 0, compute)
        lines.append([row, "", ""] + [f"{found[key]:.3f}" for key in
                                      ("frechet", "precision", "recall")] + [""])
    show(["guidance", "tokens", "ms an image", "Fréchet", "precision", "recall", "in class"],
         lines, f"{trial.headline()}, " + ", ".join(f"{key} {x:g}" for key, x in sampling.items()))
    path = trial.folder / "guidance.png"
    plots.save_curve(path, curves, y_label="Frechet distance of samples",
                     x_label="CPU milliseconds an image; guided from left to right: at no scale, "
                             "at the first ones, at all")
    print("wrote", path)


if __name__ == "__main__":
    one_line(main)
