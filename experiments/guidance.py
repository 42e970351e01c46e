"""Where should guidance be strong? Its strength t at each scale, tried with one model.

    python experiments/guidance.py --data-dir DIR --cfg 3 --n 2000     classes of CIFAR-10

Guidance moves logits away from the prediction without a class: (1 + t) cond - t uncond.

    row            1x1  2x2  3x3  4x4  6x6  8x8
    none            0    0    0    0    0    0
    ramp 3          0   .6  1.2  1.8  2.4    3     the original code, and chapter 6
    constant 3      3    3    3    3    3    3
    constant 1.5   1.5  1.5  1.5  1.5  1.5  1.5    the mean of the ramp over the scales

Nothing is trained. All rows draw from the shipped model with its own top-k and top-p.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.trial import Trial, cells, number, run_main, training, trial_parser


def main():
    parser = trial_parser(__doc__, n=3000, seeds=2)
    parser.add_argument("--cfg", type=number(float, 0.01), default=3.0, help="strength [3]")
    trial = Trial("guidance", parser.parse_args())
    tokenizer, cfg, lines = training.load_tokenizer(trial.shipped)[0], trial.args.cfg, []
    digits = dict(ms=1, frechet=3, precision=3, recall=3, in_class=1)
    var, about = training.load_transformer(trial.shipped)
    likely = {name: about["sampling"][name] for name in ("top_k", "top_p")}
    rows = {"none": 0.0, f"ramp {cfg:g}": cfg, f"constant {cfg:g}": [cfg] * tokenizer.K,
            f"constant {cfg / 2:g}": [cfg / 2] * tokenizer.K}
    for row, t in rows.items():
        found = []
        for seed in trial.seeds:
            found.append(trial.measure(row, seed, lambda: trial.judged(
                tokenizer, var, seed, cfg=t, **likely)))
        lines.append([row, *cells(found, digits)])
    rebuilt = trial.reconstructed("shipped", tokenizer)
    lines.append(["held-out images", *cells([trial.floor()], digits)])
    lines.append(["their reconstructions", *cells([rebuilt], digits)])
    trial.show(["guidance", "CPU ms per image", "Fréchet", "precision", "recall",
                "in class, %"], lines)


if __name__ == "__main__":
    run_main(main)
