"""Is the tokenizer that reconstructs best also the best to generate from?

    python experiments/generability.py                         shapes
    python experiments/generability.py --dataset cifar10 --data-dir DIR --tokenizer-steps 3000

In stage 1 the decoder is shown the codes that fit an image best, in sampling those that a
transformer drew, errors included. Each row trains another tokenizer, then the same transformer on
its tokens, with equal steps. A seed is that of both. The rows:

    default           chapter 5's
    dropout           in training a share of the images keeps its first m maps only, m uniform in
                      1..K: the decoder is shown f_hat_m (XQ-GAN, Li et al. 2024)
    perturbed         in training a tenth of the tokens is exchanged for a near code, one
                      of the nearest fifth: the decoder is shown the f_hat of these (RobustTok, Qiu
                      et al. 2025, takes the nearest 100)
    V                 fewer codes than 512, or more
    coarse            weight of each f_hat before the last in the quantizer's loss, instead of 0.2

          f -> tokens -> f_hat -> losses of the quantizer, the same in all rows
                    \\-> fewer or other tokens -> f_hat' -> decoder -> loss of the image

PSNR and the first two Fréchet distances are of reconstructions, the second of them after a tenth of
the tokens was exchanged: RobustTok's pFID, with the judge in place of Inception. The others are of
samples, drawn without guidance from all codes. Bits are those of the row's own tokens. The last
line says how well each column predicts the order of the rows by their samples: 1 or -1 perfectly,
0 not at all.

Shapes: f, f_hat (B, C, h, w); tokens: list of K (B, h_k*w_k).
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.batches import to_float  # noqa: E402
from engine.options import one_line  # noqa: E402
from experiments.self_correction import exchange, neighbours_of  # noqa: E402
from experiments.trial import Trial, of_seeds, read_arguments, show  # noqa: E402
from report import judge, plots  # noqa: E402

RATE, NEAR = 0.1, 0.2                                       # of the tokens, and of the codes


def first_maps(share):
    """-> spoil(model, tokens): a share of the images is rebuilt from its first maps alone"""
    def spoil(model, tokens):
        steps = torch.stack(model.pyramid(tokens))                   # (K, B, C, h, w)
        K, B = steps.shape[:2]
        last = torch.where(torch.rand(B) < share, torch.randint(K, (B,)), K - 1)
        return steps[last, torch.arange(B)]                          # (B, C, h, w)
    return spoil


def perturbed(model, tokens):
    """Some tokens are exchanged for near ones, in every map: no later map knows of an error."""
    V = model.config.vocab_size
    neighbours = neighbours_of(model.quantizer.codebook, int(NEAR * V))
    return model.features([exchange(tokens_k, RATE, neighbours) for tokens_k in tokens])


def decoder_sees(spoil):
    """-> a change of stage 1: in training the decoder is shown spoil(model, tokens)"""
    def change(stage):
        model, learn = stage.model, stage.model.learn_to_quantize

        def learn_and_spoil(f):
            f_hat, tokens, loss, extra = learn(f)
            if model.training:
                # Straight-through: whatever the decoder is shown, its gradient goes to f.
                with torch.no_grad():
                    f_hat = spoil(model, tokens)
            return f_hat, tokens, loss, extra
        model.learn_to_quantize = learn_and_spoil
    return change


# Row -> settings of its tokenizer, and what its decoder is shown in training if not f_hat.
ROWS = {
    "default": ([], None),
    "dropout 10 %": ([], first_maps(0.1)),
    "dropout 50 %": ([], first_maps(0.5)),
    "perturbed 10 %": ([], perturbed),
    "V = 128": (["vocab_size=128"], None),
    "V = 2048": (["vocab_size=2048"], None),
    "coarse = 0": (["coarse=0"], None),
    "coarse = 1": (["coarse=1"], None),
}


@torch.no_grad()
def rebuilt_perturbed(tokenizer, images, rows):
    """As judge.rebuilt(), from perturbed tokens"""
    for part in judge.batches_of(images, rows):
        tokens = tokenizer.image_to_tokens(to_float(part))
        image = tokenizer.decode(perturbed(tokenizer, tokens)).float().clamp(-1, 1)
        yield (image + 1) / 2


def measure(trial, row, seed):
    """Train the row's tokenizer and transformer -> dict of what both reach"""
    settings, spoil = ROWS[row]
    tokenizer = trial.train_tokenizer(row, seed, ["--set", *settings] if settings else [],
                                      [decoder_sees(spoil)] if spoil else [])

    def of_the_tokenizer():
        torch.manual_seed(seed)
        found = trial.reconstructed(tokenizer)
        far = trial.distance(rebuilt_perturbed(tokenizer, *trial.held_out()))
        return dict(psnr=found["psnr"], rebuilt=found["frechet"], perturbed=far["frechet"])
    rebuilt = trial.measure(f"tokenizers/{row}", seed, of_the_tokenizer)
    return {**rebuilt, **trial.row(row, seed, tokenizer, cfg=0.0)}


def rank_correlation(a, b):
    """Spearman's: the correlation of ranks, for numbers of which no two are equal"""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def main():
    args = read_arguments(__doc__, dataset="shapes", steps=1000, tokenizer_steps=1000,
                          n=4000)
    trial = Trial("generability", args)
    found = {row: [measure(trial, row, seed) for seed in trial.seeds] for row in ROWS}
    columns = dict(psnr=2, rebuilt=3, perturbed=3, bits=1, frechet=3, precision=3, recall=3)
    lines = [[row] + [of_seeds([f[key] for f in each], digits) for key, digits in columns.items()]
             for row, each in found.items()]
    floor = trial.measure("held-out", 0, trial.floor)
    frechet, precision, recall = (f"{floor[key]:.3f}" for key in
                                  ("frechet", "precision", "recall"))
    lines.append(["held-out images", "", frechet, "", "", frechet, precision, recall])
    mean = {key: [np.mean([f[key] for f in each]) for each in found.values()] for key in columns}
    lines.append(["rank correlation with Fréchet of samples"] + [
        f"{rank_correlation(mean[key], mean['frechet']):.2f}"
        for key in ("psnr", "rebuilt", "perturbed", "bits")] + [""] * 3)
    show(["tokenizer", "PSNR, dB", "Fréchet of reconstructions", "of perturbed ones",
          "bits an image", "Fréchet of samples", "precision", "recall"], lines, trial.headline())
    # A row is a line between its seeds.
    points = {row: [(f["psnr"], f["frechet"]) for f in each] for row, each in found.items()}
    path = trial.folder / "generability.png"
    plots.save_curve(path, points, x_label="PSNR of reconstructions, dB",
                     y_label="Frechet distance of samples", size=(860, 460))
    print("wrote", path)


if __name__ == "__main__":
    one_line(main)
