"""Does training on prefixes with errors teach a transformer to correct its own?

    python experiments/self_correction.py --dataset shapes --steps 1200
    python experiments/self_correction.py --data-dir DIR           three classes of CIFAR-10

In training every map follows real coarser maps, in sampling those that the model drew (exposure
bias). Nothing has taught it to correct an error, so errors add up. Infinity's answer is to train on
maps with errors, and with labels that correct them, as they are quantized after the error:

    chapter 5          f_hat += r_k                   labels of map k+1: codes nearest to f - f_hat
    labels kept        f_hat += r_k with errors       labels of chapter 5 (for comparison)
    self-correction    f_hat += r_k with errors       labels of map k+1: codes nearest to f - f_hat

An error is a token exchanged for one of the 10 nearest codes. Every image has its own share of
them, drawn from 0 to the number in the row's name ("labels kept": 0.3). All rows take equal steps.
What is measured:

    bits, real       of a held-out image given its class, after its own maps: the exact likelihood
    bits, exchanged  the same after maps with a fifth of the tokens exchanged, labels corrected
    bits, drawn      the same where the map before was drawn by the model, those before it are real
                     (after several drawn maps, no model could know which image is meant)
    bits, own        of what the model draws after its own maps: its entropy. A perfect model needs
                     as many for its own images as for real ones.
    Fréchet, guided  distance of samples without guidance, and of samples as the preset draws them;
                     precision, recall and in class are of the former

Shapes: f, f_hat (B, C, h, w); tokens, labels: list of K (B, n); inputs (B, L - 1, C).

Sources: Infinity (Han et al. 2025), bitwise self-correction, which flips bits of codes; exposure
bias: Ranzato et al. 2016. All other options: --help.
"""
import functools
import math
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.batches import rows_of  # noqa: E402
from data.views import Views  # noqa: E402
from engine.devices import autocast  # noqa: E402
from engine.options import one_line  # noqa: E402
from experiments.trial import AT_ONCE, Trial, of_seeds, read_arguments, show  # noqa: E402
from report import plots  # noqa: E402

training, drawing = import_module("05_train"), import_module("06_sample_and_edit")
# Row -> how many tokens are exchanged at most, and whether labels correct it. None: chapter 5.
ROWS = {"plain": None, "labels kept": (0.3, False), "self-correction 0.1": (0.1, True),
        "self-correction 0.3": (0.3, True)}
NEAR, TESTED_RATE, TESTED_IMAGES = 10, 0.2, 500
PREFIXES = "real", "exchanged", "drawn", "own"
FIGURES = "frechet", "guided", "precision", "recall", "in_class"


# -- Prefixes with errors --------------------------------------------------------------------------

def neighbours_of(codebook, count):
    """The nearest other codes of each code. (V, C) -> (V, count)"""
    distance = torch.cdist(codebook, codebook).fill_diagonal_(torch.inf)
    return distance.topk(count, largest=False).indices


def exchange(tokens, rate, neighbours):
    """tokens (B, n) with a share of them, rate (a number or (B, 1)), exchanged for neighbours"""
    choice = torch.randint(neighbours.shape[1], tokens.shape)
    return torch.where(torch.rand(tokens.shape) < rate, neighbours[tokens, choice], tokens)


@torch.no_grad()
def requantize(tokenizer, f, change):
    """Algorithm 1 with errors. After map k is quantized its tokens become change(k, tokens): f_hat
    grows by these, so the next map quantizes what is really missing.
    -> labels (the tokens before their change), inputs (of f_hat, after it)"""
    f_hat, labels, inputs = torch.zeros_like(f), [], []
    for k in range(tokenizer.K):
        missing = f - f_hat if tokenizer.config.residual else f
        labels.append(tokenizer.quantizer.nearest(tokenizer.downsample_to(missing, k)))
        f_hat, next_input = tokenizer.next_input(k, f_hat, change(k, labels[k]))
        inputs.append(next_input)
    return labels, torch.cat(inputs[:-1], 1)


@torch.no_grad()
def keep_labels(tokenizer, f, change):
    """The same errors, but later maps do not know of them. -> labels, inputs"""
    labels = tokenizer.quantize(f)
    return labels, tokenizer.teacher_inputs([change(*each) for each in enumerate(labels)])


# -- Training on them ------------------------------------------------------------------------------

@functools.cache
def features(trial, tokenizer, split):
    """f of all images of a split in the order of the token cache. -> (views * N, C, h, w), in the
    precision the encoder computes in: re-quantized, they give the tokens of the cache."""
    views = Views(trial.data[split][0], trial.settings.views if split == "train" else 1)
    jobs = [(rows, [view]) for view in range(views.count)
            for rows in np.split(np.arange(len(views)), range(views.at_once, len(views),
                                                              views.at_once))]
    with torch.no_grad(), autocast(trial.processes.device, trial.precision):
        return torch.cat([tokenizer.encode(image) for image in views.batches(jobs, lambda x: x)])


def corrupting(features, strength, correct, neighbours):
    """-> chapter 5's second stage, trained on prefixes with errors. features(): of all images.
    What it evaluates are real prefixes, as ever."""
    class Corrupting(training.TransformerStage):
        def rows(self, split, indices):
            """In training f (B, C, h, w) takes the place of the tokens."""
            tokens, classes = super().rows(split, indices)
            return features()[indices].float() if split == "train" else tokens, classes

        def loss(self, model, batch, progress):
            f, classes = batch
            rate = strength * torch.rand(len(f), 1)        # one for each image, from none on
            labels, inputs = (requantize if correct else keep_labels)(
                self.tokenizer, f, lambda k, tokens: exchange(tokens, rate, neighbours))
            with self.autocast():
                logits = model(classes, inputs)
            labels = torch.cat(labels, 1)
            loss = F.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
            right = (logits.argmax(-1) == labels).float().mean()
            return (self.token_weight * loss).mean(), (loss.detach().mean(0), right)
    return Corrupting


# -- Measuring what they cost ----------------------------------------------------------------------

@torch.no_grad()
def bits_by_prefix(tokenizer, var, f, classes, neighbours, rate=TESTED_RATE):
    """-> {name of PREFIXES: bits of these images by map (B, K)}"""
    sizes = [side * side for side in tokenizer.scales]

    def read(change):
        labels, inputs = requantize(tokenizer, f, change)
        each = var(classes, inputs).float().log_softmax(-1)                  # (B, L, V)
        wanted = each.gather(2, torch.cat(labels, 1)[..., None])[..., 0]     # (B, L)
        return each, torch.stack([part.sum(1) for part in wanted.split(sizes, 1)], 1)

    each, real = read(lambda k, tokens: tokens)
    exchanged = read(lambda k, tokens: exchange(tokens, rate, neighbours))[1]
    drawn_maps, drawn = [drawing.draw(part) for part in each.split(sizes, 1)], [real[:, 0]]
    for last in range(tokenizer.K - 1):                    # the one map that is drawn
        found = read(lambda k, tokens: drawn_maps[k] if k == last else tokens)[1]
        drawn.append(found[:, last + 1])
    own = drawing.sample_tokens(tokenizer, var, classes)
    own = drawing.log_likelihood(tokenizer, var, own, classes)
    return {name: -nats / math.log(2) for name, nats in
            zip(PREFIXES, (real, exchanged, torch.stack(drawn, 1), own))}


def measure(trial, tokenizer, var, seed, neighbours):
    """-> dict: bits of an image after each of PREFIXES, and by map; the judge's figures"""
    images, labels = trial.data["test"]
    rows = rows_of(len(images), TESTED_IMAGES)
    torch.manual_seed(seed)
    parts = [bits_by_prefix(tokenizer, var, features(trial, tokenizer, "test")[part].float(),
                            torch.from_numpy(labels[part]), neighbours)
             for part in np.array_split(rows, -(-len(rows) // AT_ONCE))]
    by_map = {name: torch.cat([part[name] for part in parts]).double().mean(0)
              for name in PREFIXES}
    guided = {name: getattr(trial.settings, name) for name in ("cfg", "top_k", "top_p")}
    return {**{name: float(bits.sum()) for name, bits in by_map.items()},
            **{f"{name} by map": bits.tolist() for name, bits in by_map.items()},
            **trial.judged(tokenizer, var, seed, cfg=0.0),
            "guided": trial.judged(tokenizer, var, seed, **guided)["frechet"]}


def main():
    args = read_arguments(__doc__)
    trial = Trial("self_correction", args)
    tokenizer, lines, curves = trial.tokenizer(), [], {}
    neighbours = neighbours_of(tokenizer.quantizer.codebook, NEAR)
    for row, how in ROWS.items():
        stage = how and corrupting(lambda: features(trial, tokenizer, "train"), *how, neighbours)
        found = []
        for seed in trial.seeds:
            var = trial.train(row, seed, tokenizer, stage=stage)
            found.append(trial.measure(row, seed, lambda: measure(trial, tokenizer, var, seed,
                                                                  neighbours)))
        lines.append([row] + [of_seeds([f[key] for f in found], 1) for key in PREFIXES]
                     + [of_seeds([f[key] for f in found], 3) for key in FIGURES])
        by_map = {name: np.mean([f[f"{name} by map"] for f in found], 0) for name in PREFIXES}
        for name in ("real", "drawn") if row in ("plain", list(ROWS)[-1]) else ():
            curves[f"{row}, {name}"] = list(zip(tokenizer.scales, by_map[name]
                                                / np.square(tokenizer.scales)))
    floor = trial.measure("held-out", 0, trial.floor)
    lines.append(["held-out images"] + [""] * len(PREFIXES)
                 + [f"{floor[key]:.3f}" if key in floor else "" for key in FIGURES])
    show(["training", *[f"bits, {name}" for name in PREFIXES], "Fréchet", "guided", "precision",
          "recall", "in class"], lines, trial.headline())
    path = trial.folder / "self_correction.png"
    plots.save_curve(path, curves, title="bits a token", x_label="side of the map")
    print("wrote", path)


if __name__ == "__main__":
    one_line(main)
