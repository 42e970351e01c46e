"""Which map spoils a sample? The first m maps are real, the shipped model draws the rest.

    python experiments/independence.py                                     shapes
    python experiments/independence.py --dataset cifar10 --data-dir DIR    three classes

The tokens of a map are drawn independently, given the coarser maps, which must therefore
settle what the halves of an image have to agree on. PSNR compares a result with the image
that all real maps decode to. At a bad map the Fréchet distance falls most.
"""
import torch

from trial import Trial, drawing, run_main, training, trial_parser
from report import health


def main():
    trial = Trial("independence", trial_parser(__doc__, "shapes", n=2000).parse_args())
    tokenizer, _ = training.load_tokenizer(trial.shipped)
    var, _ = training.load_transformer(trial.shipped)
    images, rows = trial.some("test")                      # of all classes
    real = list(trial.held_out(tokenizer, (images[rows], trial.data["test"][1][rows])))
    target = torch.cat([tokenizer.tokens_to_image(tokens) for tokens, _ in real])
    images = {"all maps real": (target[:10] + 1) / 2}
    rows = {"all (reconstructions)": [trial.compare([(target + 1) / 2])]}
    for m in reversed(range(tokenizer.K)):
        side = tokenizer.scales[m - 1]
        name = f"up to {side}x{side}" if m else "none"
        generator, drawn = torch.Generator().manual_seed(0), []
        for tokens, labels in real:
            keep = [torch.full(map_k.shape[1:], k < m) for k, map_k in enumerate(tokens)]
            drawn.append(drawing.generate(tokenizer, var, labels, cfg=0.0, tokens=tokens,
                                          keep=keep, generator=generator))
        db = float(health.psnr(2 * torch.cat(drawn) - 1, target).mean())
        left = sum(side * side for side in tokenizer.scales[m:])
        rows[name] = [dict(trial.compare(drawn), psnr=db, left=left)]
        images[f"{name} real, {db:.1f} dB"] = drawn[0][:10]
    trial.show("maps that are real", {
        "tokens drawn": ("left", 0), "PSNR, dB": ("psnr", 1), "Fréchet": ("frechet", 3),
        "precision": ("precision", 2), "recall": ("recall", 2)}, rows)
    trial.draw(images, footer="The model draws the other maps (cfg 0). dB: PSNR to row 1.")


if __name__ == "__main__":
    run_main(main)
