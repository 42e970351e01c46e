"""How many scales, must they build on each other, and which of them must a map see?

    python experiments/scales.py                               shapes

LEGEND explains the rows. Sources: MVAR (Zhang et al. 2025); Kumar et al. (2025).
"""
from types import SimpleNamespace

import torch

from trial import JUDGED, Trial, drawing, run_main, transformer, trial_parser

LEGEND = """K: number of token maps, the last one 8x8. K = 1 draws all tokens at once.
Independent: each map quantizes f itself, not what coarser maps left over.
Markov: the tokenizer of K = 6, but a map attends to itself alone. All it knows of coarser
maps is their sum f_hat, its input. (No other rows share a tokenizer and can be alike.)"""


class MarkovVAR(transformer.VAR):
    """Map k attends to itself alone, in training and in sampling."""

    def __init__(self, config):
        super().__init__(config)
        self.mask = self.scale_of_token[:, None] == self.scale_of_token    # block-diagonal

    def new_cache(self):
        """A map meets only its own keys and values, so nothing is kept."""
        return [SimpleNamespace(append=lambda k, v: (k, v)) for _ in self.blocks]


# Row -> sides of the maps, whether they are residual, class of the transformer
SIX = (1, 2, 3, 4, 6, 8)
ROWS = {
    "K = 1": ((8,), True, transformer.VAR),
    "K = 2": ((1, 8), True, transformer.VAR),
    "K = 3": ((1, 4, 8), True, transformer.VAR),
    "K = 4": ((1, 2, 4, 8), True, transformer.VAR),
    "K = 6": (SIX, True, transformer.VAR),
    "K = 6, independent": (SIX, False, transformer.VAR),
    "K = 6, Markov": (SIX, True, MarkovVAR),
}


def main():
    parser = trial_parser(__doc__, "shapes", steps=1000, tokenizer_steps=1000, n=4000,
                          seeds=2)
    trial, rows, images = Trial("scales", parser.parse_args()), {}, {}
    labels = torch.arange(len(trial.names))
    for row, (scales, residual, model) in ROWS.items():
        kind, rows[row] = row.removesuffix(", Markov"), []
        for seed in trial.seeds:
            tokenizer = trial.train_tokenizer(kind, seed, scales=scales,
                                              config=dict(residual=residual))
            rebuilt = trial.reconstructed(kind, tokenizer, seed)
            var = trial.train(row, seed, tokenizer, model)
            found = trial.measure(row, seed, lambda: dict(
                trial.judged(tokenizer, var, seed, strict=True, cfg=0.0),
                bits=sum(trial.bits(tokenizer, var))))
            rows[row].append(dict(found, tokens=var.L, psnr=rebuilt["psnr"],
                                  rebuilt=rebuilt["frechet"]))
            if seed == 0:                 # with the same random numbers in every row
                images[row] = drawing.generate(tokenizer, var, labels, cfg=0.0,
                                               generator=torch.Generator().manual_seed(0))
    rows["held-out images"] = [trial.floor()]
    trial.show("scales", {"tokens": ("tokens", 0), "PSNR, dB": ("psnr", 2),
                          "Fréchet, rebuilt": ("rebuilt", 3),
                          "bits per image": ("bits", 1), **JUDGED,
                          "second judge": ("second", 3)}, rows)
    trial.draw(images, column_labels=trial.names, footer=LEGEND)


if __name__ == "__main__":
    run_main(main)
