"""Where should guidance be strong? Its strength t at each scale, tried with one model.

    python experiments/guidance.py --data-dir DIR --n 2000         classes of CIFAR-10

Guidance moves logits away from the prediction without a class: (1 + t) cond - t uncond. A
ramp grows from t = 0 at the first scale to its number at the last one. Nothing is trained.
"""
from trial import JUDGED, Trial, run_main, training, trial_parser


def main():
    trial, rows = Trial("guidance", trial_parser(__doc__, n=3000, seeds=2).parse_args()), {}
    tokenizer, _ = training.load_tokenizer(trial.shipped)
    var, about = training.load_transformer(trial.shipped)
    likely = {name: about["sampling"][name] for name in ("top_k", "top_p")}
    ways = {"none": 0.0, "ramp 3": 3.0}
    for t in (0.5, 1, 1.5, 2, 3):
        ways[f"constant {t:g}"] = [t] * tokenizer.K
    for row, cfg in ways.items():
        rows[row] = [trial.measure(row, seed, lambda: trial.judged(
            tokenizer, var, seed, cfg=cfg, **likely)) for seed in trial.seeds]
    rows["held-out images"] = [trial.floor()]
    rows["their reconstructions"] = [trial.reconstructed("shipped", tokenizer)]
    trial.show("guidance", JUDGED, rows)


if __name__ == "__main__":
    run_main(main)
