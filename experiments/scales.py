"""How many scales, must they build on each other, and which of them must a map see?

    python experiments/scales.py                               shapes
    python experiments/scales.py --dataset cifar10 --data-dir DIR --tokenizer-steps 3000

All rows end in an 8x8 map. Three things change:

    K            (8), (1, 8), (1, 4, 8), (1, 2, 4, 8), (1, 2, 3, 4, 6, 8). K = 1 is a plain VQ-VAE
                 whose 64 tokens are drawn at once, each independently of the others
    independent  each map quantizes f itself, not what coarser maps left over: f_hat is the last map
    Markov       the tokens of the row K = 6, but a map attends to itself alone. Of the coarser maps
                 it knows their sum f_hat, which its inputs are, and not the maps one by one

         1  2  2  2  2                   1  2  2  2  2
    1    x  .  .  .  .              1    x  .  .  .  .
    2    x  x  x  x  x   -> Markov  2    .  x  x  x  x       the mask becomes block-diagonal
    2    x  x  x  x  x              2    .  x  x  x  x

Every row trains a tokenizer of its own (except Markov) and a transformer on its tokens, with equal
steps; a seed is that of both. PSNR and the first Fréchet distance are of reconstructions, the rest
is of samples, drawn without guidance from all codes. Bits are those of the row's own tokens.

Shapes: labels (B,); teacher_inputs (B, L - first, C), first = scales[0]**2; logits (B, L, V).

Sources: VAR (Tian et al. 2024), section 3, for residual maps and block-causal attention. MVAR
(Zhang et al. 2025) shows each scale only the one before it; Kumar et al. 2025 call VAR with such a
mask a discrete diffusion.
"""
import sys
from importlib import import_module
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.trial import Trial, of_seeds, read_arguments, show  # noqa: E402
from engine.options import one_line  # noqa: E402
from report import plots  # noqa: E402

training, transformer = import_module("05_train"), import_module("04_var_transformer")
drawing = import_module("06_sample_and_edit")


class NothingKept:
    """In place of chapter 4's KVCache: a map meets its own keys and values only."""

    def append(self, k, v):
        return k, v

    def keep_first(self, count):
        """There is nothing to cut."""


class MarkovVAR(transformer.VAR):
    """Map k attends to itself alone, in training as in sampling."""

    def new_cache(self):
        return [NothingKept() for _ in self.blocks]

    def forward(self, labels, teacher_inputs):
        """Scale by scale, as in sampling: what no map looks at need not be masked."""
        if self.training and self.config.label_dropout > 0:
            hidden = torch.rand(len(labels), device=labels.device) < self.config.label_dropout
            labels = torch.where(hidden, self.config.num_classes, labels)
        conditioning, cache = self.conditioning(labels), self.new_cache()
        sizes = [side * side for side in self.config.scales[1:]]
        inputs = [None, *teacher_inputs.split(sizes, 1)]             # K of (B, h_k*w_k, C)
        return torch.cat([self.step(k, inputs_k, conditioning, cache)
                          for k, inputs_k in enumerate(inputs)], 1)            # (B, L, V)


class MarkovStage(training.TransformerStage):
    model_class = MarkovVAR


# Row -> settings of its tokenizer, and the second stage if it is not chapter 5's.
SIX = "scales=1,2,3,4,6,8"
ROWS = {
    "K = 1": (["scales=8"], None),
    "K = 2": (["scales=1,8"], None),
    "K = 3": (["scales=1,4,8"], None),
    "K = 4": (["scales=1,2,4,8"], None),
    "K = 6": ([SIX], None),
    "K = 6, independent": ([SIX, "residual=false"], None),
    "K = 6, Markov": ([SIX], MarkovStage),
}


def trained(trial, row, seed):
    """-> the row's tokenizer and its transformer"""
    settings, stage = ROWS[row]
    tokenizer = trial.train_tokenizer(" ".join(settings), seed, ["--set", *settings])
    return tokenizer, trial.train(row, seed, tokenizer, stage=stage)


def measure(trial, row, seed):
    """-> dict of what the row's tokenizer and transformer reach"""
    tokenizer, var = trained(trial, row, seed)
    kind = "tokenizers/" + " ".join(ROWS[row][0])
    rebuilt = trial.measure(kind, seed, lambda: trial.reconstructed(tokenizer))
    found = trial.measure(row, seed, lambda: {
        **trial.bits(tokenizer, var), **trial.judged(tokenizer, var, seed, cfg=0.0)})
    return dict(found, L=sum(side * side for side in tokenizer.scales), psnr=rebuilt["psnr"],
                rebuilt=rebuilt["frechet"])


def main():
    args = read_arguments(__doc__, dataset="shapes", steps=1000, tokenizer_steps=1000,
                          n=4000)
    trial = Trial("scales", args)
    found = {row: [measure(trial, row, seed) for seed in trial.seeds] for row in ROWS}
    columns = dict(psnr=2, rebuilt=3, bits=1, frechet=3, precision=3, recall=3, in_class=3,
                   seconds=4)
    lines = [[row, str(each[0]["L"])] + [of_seeds([f[key] for f in each], digits)
                                         for key, digits in columns.items()]
             for row, each in found.items()]
    floor = trial.measure("held-out", 0, trial.floor)
    frechet, precision, recall = (f"{floor[key]:.3f}" for key in
                                  ("frechet", "precision", "recall"))
    lines.append(["held-out images", "", "", frechet, "", frechet, precision, recall, "", ""])
    show(["scales", "tokens", "PSNR, dB", "Fréchet of reconstructions", "bits an image",
          "Fréchet of samples", "precision", "recall", "in class", "CPU s an image"], lines,
         trial.headline())
    # Samples of the first seed, with the same random numbers in every row.
    labels = torch.arange(len(trial.names))
    pictures = [drawing.generate(*trained(trial, row, 0), labels, cfg=0.0,
                                 generator=torch.Generator().manual_seed(0)) for row in ROWS]
    path = trial.folder / "scales.png"
    plots.save_grid(path, torch.cat(pictures), len(labels), row_labels=list(ROWS),
                    column_labels=trial.names)
    print("wrote", path)


if __name__ == "__main__":
    one_line(main)
