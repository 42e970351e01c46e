"""Which map spoils a sample? The first m maps are real, the shipped model draws the rest.

    python experiments/independence.py                                     shapes
    python experiments/independence.py --dataset cifar10 --data-dir DIR    three classes

The tokens of a map are drawn independently, given the coarser maps. If the halves of an image
match all the same, the coarser maps have settled what they must agree on. The more maps are
real, the nearer the result is to the image that all real maps decode to (PSNR), and a bad map
shows where the Fréchet distance falls most.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.trial import Trial, cells, drawing, run_main, training, trial_parser
from report import health


def main():
    args = trial_parser(__doc__, "shapes", n=2000).parse_args()
    trial = Trial("independence", args)
    tokenizer, _ = training.load_tokenizer(trial.shipped)
    var, about = training.load_transformer(trial.shipped)
    ways = {"plain": dict(cfg=0.0), "default": about["sampling"]}
    real = list(trial.held_out(tokenizer))[:max(1, args.n // 100)]
    all_real = [tokenizer.tokens_to_image(tokens) for tokens, _ in real]
    lines, rows = [], {"all maps real": (all_real[0][:10] + 1) / 2}
    for m in reversed(range(tokenizer.K)):
        side = tokenizer.scales[m - 1]
        name = f"up to {side}x{side}" if m else "none"
        drawn, found = {}, {}
        for way, sampling in ways.items():
            generator = torch.Generator().manual_seed(0)
            drawn[way] = []
            for tokens, labels in real:
                keep = [torch.full(map_k.shape[1:], k < m) for k, map_k in enumerate(tokens)]
                drawn[way].append(drawing.generate(tokenizer, var, labels, tokens=tokens,
                                                   keep=keep, generator=generator, **sampling))
            for measure, value in trial.compare(drawn[way]).items():
                found[f"{measure}, {way}"] = value
        db = [health.psnr(2 * image - 1, target) for image, target in zip(drawn["plain"], all_real)]
        found["psnr"] = float(torch.cat(db).mean())
        rows[f"{name} real, {found['psnr']:.1f} dB"] = drawn["plain"][0][:10]
        digits = {"psnr": 1, "frechet, plain": 3, "precision, plain": 2, "frechet, default": 3,
                  "precision, default": 2}
        lines.append([name, f"{var.L - sum(s * s for s in tokenizer.scales[:m])}",
                      *cells([found], digits)])
    rebuilt = trial.compare([(image + 1) / 2 for image in all_real])
    lines.insert(0, ["all (reconstructions)", "0", "", *2 * cells([rebuilt], dict(frechet=3, precision=2))])
    trial.show(["maps that are real", "tokens drawn", "PSNR, dB", "Fréchet, cfg 0", "precision",
                "Fréchet, default", "precision"], lines)
    trial.draw(list(rows.values()), list(rows))


if __name__ == "__main__":
    run_main(main)
