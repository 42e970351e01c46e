"""Bitwise modelling: 2^32 codes at the price of 64 outputs (Infinity, Han et al. 2025).

    python experiments/infinity.py --dataset shapes
    python experiments/infinity.py --data-dir DIR --dataset cifar10         three of its classes

A softmax needs one output for each code. Infinity keeps the sign of each channel instead and
predicts, all at once, the signs of a vector:

    vector (0.9, -0.1, 0.2, ...) --> bits 1 0 1 ...    `bits` tokens at one position, each 0 or 1
    softmax     2^bits outputs a position              512 | 65,536 | 4,294,967,296
    bitwise     2 logits a bit                          18 |     32 |            64

A bit still depends on the class and on all coarser maps, but no longer on the other bits of its
vector. The likelihood stays exact; the row "2^9, softmax" tells, on the very tokens of the row
"2^9, bitwise", what is lost.

Self-correction: a model trained on true maps alone has never seen its own mistakes. So bits flip at
random in training. The label is the bit *before* its flip; finer maps quantize what f misses
*after* it, and so learn to correct mistakes:

    rate_k ~ {0, 0.01 .. 0.30};  label_k = sign(f - f_hat);  f_hat += codes(label_k, some flipped)

Columns: reconstructions; exact bits of a held-out image, of log2(V) * 130 possible; samples without
guidance at temperature 1, then at one that falls from 1 at the first scale to --cool at the last.

Shapes: f (B, C, h, w), C = bits; tokens: list of K (B, n_k * bits), the bits of a position side by
side; logits (B, L * bits, 2). So V = 2, and chapters 2 to 6 work on bits as they are.

Sources: Infinity (Han et al. 2025), section 3; binary spherical quantization (Zhao et al. 2024).
Differs from Infinity: vectors are not normalised before they are quantized; each image of a batch
has its own rates of flips; every token counts alike in the loss; class labels, not texts.
"""
import math
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.batches import batch_indices, to_float  # noqa: E402
from data.views import view_of  # noqa: E402
from engine import BadInput  # noqa: E402
from engine.options import one_line  # noqa: E402
from experiments.self_correction import requantize  # noqa: E402
from experiments.trial import Trial, of_seeds, read_arguments, show  # noqa: E402
from report import plots  # noqa: E402

vq, vqvae = import_module("01_vq"), import_module("02_multiscale_vqvae")
transformer, training = import_module("04_var_transformer"), import_module("05_train")
drawing = import_module("06_sample_and_edit")


# -- Signs instead of indices ----------------------------------------------------------------------

class BitQuantizer(vq.Quantizer):
    """Chapter 1's lookup-free quantizer without its index: a vector is `bits` tokens of two values.
    An index of 24 bits or more would need tables, counts and softmaxes that nobody can store."""
    extra_loss = vq.LookupFreeQuantizer.extra_loss

    def __init__(self, bits, entropy=0.1):
        super().__init__()
        self.dim, self.entropy, self.size = bits, entropy, 1 / math.sqrt(bits)

    @classmethod
    def build(cls, vocab_size, dim, learn):
        return cls(dim)

    def nearest(self, x):                                  # (..., n, C) -> (..., n * C)
        return (x > 0).long().flatten(-2)

    def lookup(self, tokens):                              # (..., n * C) -> (..., n, C)
        return (2 * tokens.unflatten(-1, (-1, self.dim)) - 1) * self.size


vq.QUANTIZERS["bits"] = BitQuantizer                       # a name for --quantizer


def with_indices(tokenizer):
    """The same tokenizer with chapter 1's quantizer: one token a position, of V = 2^bits."""
    bits = tokenizer.config.latent_dim
    same = vqvae.MultiScaleVQVAE(replace(tokenizer.config, quantizer="lfq", vocab_size=2 ** bits))
    same.load_state_dict(tokenizer.state_dict())
    return same.eval().requires_grad_(False)


# -- A head of two logits a bit --------------------------------------------------------------------

class BitwiseVAR(transformer.VAR):
    """Chapter 4's transformer, whose L positions each predict all bits of a vector at once."""

    def __init__(self, config):
        super().__init__(replace(config, vocab_size=2 * config.latent_dim))

    def predict(self, x, conditioning):                    # (B, n, D) -> (B, n * bits, 2)
        return super().predict(x, conditioning).unflatten(2, (-1, 2)).flatten(1, 2)


class Cooled:
    """A transformer for chapter 6's loop with a temperature for each scale. Below 1 likely tokens
    become likelier: less variety, fewer mistakes."""

    def __init__(self, var, temperatures):
        self.var, self.temperatures = var, temperatures

    def __getattr__(self, name):
        return getattr(self.var, name)

    def step(self, k, *rest):
        return self.var.step(k, *rest) / self.temperatures[k]


# -- Training, with mistakes to correct ------------------------------------------------------------

def flipped_rounds(tokenizer, f, rates):
    """Algorithm 1 in which a share rates (B, K) of the bits is wrong. f (B, C, h, w) -> labels
    (B, L * bits), the right bits given the mistakes so far, and teacher inputs (B, L-1, C)"""
    def flip(k, bits):
        return bits ^ (torch.rand(bits.shape) < rates[:, k, None])
    labels, inputs = requantize(tokenizer, f, flip)
    return torch.cat(labels, 1), inputs


def bitwise(most):
    """-> chapter 5's second stage on bits, of which a share of up to `most` flips (0: none). It is
    handed images instead of cached tokens, as flips need f; to encode costs 5 % of a step."""
    class Bitwise(training.TransformerStage):
        model_class = BitwiseVAR

        def __init__(self, settings, processes, tokenizer, config, data, class_names):
            super().__init__(settings, processes, tokenizer, config, data, class_names)
            self.sizes = [size * config.latent_dim for size in self.sizes]
            self.token_weight = self.token_weight.repeat_interleave(config.latent_dim)

        def rows(self, split, indices, view=0):
            images, labels = self.data[split]
            image = view_of(to_float(torch.from_numpy(images[indices])), view, indices, len(images))
            return image, torch.from_numpy(labels[indices])

        def batches(self, start):
            for step in range(start, self.steps):
                indices = batch_indices(step, len(self.data["train"][1]), self.batch_size,
                                        self.settings.seed + 1)
                yield self.rows("train", indices, step % self.settings.views)

        def per_token(self, model, image, labels):
            """-> (cross-entropy in nats (B, L * bits), right (B, L * bits) bool)"""
            with torch.no_grad(), self.autocast():
                f = self.tokenizer.encode(image)
            flips = round(100 * most) if self.model.training else 0
            rates = torch.randint(flips + 1, (len(image), self.tokenizer.K)) / 100
            with torch.no_grad():
                wanted, inputs = flipped_rounds(self.tokenizer, f.float(), rates)
            with self.autocast():
                logits = model(labels, inputs)
            loss = F.cross_entropy(logits.mT.float(), wanted, reduction="none")
            return loss, logits.argmax(-1) == wanted
    return Bitwise


# -- The table -------------------------------------------------------------------------------------

def make_tokenizer(trial, name, options=()):
    """-> tokenizer, dict with psnr and frechet of its reconstructions of held-out images"""
    tokenizer = trial.train_tokenizer(name, 0, options)
    return tokenizer, trial.measure(f"tokenizer, {name}", 0, lambda: trial.reconstructed(tokenizer))


def exact_bits(trial, tokenizer, var):
    """Bits of a held-out image given its class, by scale. -> list of K"""
    (images, labels), parts = trial.data["test"], []
    for rows in np.array_split(np.arange(len(labels)), -(-len(labels) // 100)):
        tokens = tokenizer.image_to_tokens(to_float(torch.from_numpy(images[rows])))
        parts.append(drawing.log_likelihood(tokenizer, var, tokens,
                                            torch.from_numpy(labels[rows])))
    return (-torch.cat(parts).double().mean(0) / math.log(2)).tolist()


def examine(trial, row, seed, tokenizer, stage, cool):
    """Train a row and measure it. stage: None is chapter 5's. -> dict"""
    var = trial.train(row, seed, tokenizer, stage=stage,
                      tokens=stage and {split: trial.data[split] for split in ("train", "test")})
    cooled = Cooled(var, torch.linspace(1, cool, tokenizer.K).tolist())
    found = trial.measure(row, seed, lambda: dict(
        trial.judged(tokenizer, var, seed, cfg=0.0), outputs=var.head.out_features,
        bits=exact_bits(trial, tokenizer, var)))
    cold = trial.measure(row, f"{seed} cooled to {cool}", lambda: trial.judged(
        tokenizer, cooled, seed, cfg=0.0))
    return dict(found, cool=cold["frechet"])


def main():
    more = [("--flips", dict(type=float, default=0.3, help="largest share of flipped bits [0.3]")),
            ("--cool", dict(type=float, default=0.7, help="temperature of the last scale [0.7]"))]
    args = read_arguments(__doc__, dataset="shapes", steps=1200, tokenizer_steps=2000, n=2000,
                          more=more)
    if not 0 <= args.flips <= 1 or not args.cool > 0:
        raise BadInput("--flips must lie in 0..1, and --cool above 0")
    trial, lines, curves = Trial("infinity", args), [], {}
    vectors = make_tokenizer(trial, "vectors")
    of_bits = {bits: make_tokenizer(trial, f"2^{bits}", [
        "--quantizer", "bits", "--vocab-size", "2", "--set", f"latent_dim={bits}"])
        for bits in (9, 16, 32)}
    rows = {"512 vectors, softmax": (9, *vectors, None),
            "2^9, softmax": (9, with_indices(of_bits[9][0]), of_bits[9][1], None),
            **{f"2^{bits}, bitwise": (bits, *of_bits[bits], bitwise(0)) for bits in of_bits},
            f"2^16, flips to {args.flips:.0%}": (16, *of_bits[16], bitwise(args.flips))}
    for row, (bits, tokenizer, rebuilt, stage) in rows.items():
        found = [examine(trial, row, seed, tokenizer, stage, args.cool) for seed in trial.seeds]
        possible = [bits * side * side for side in tokenizer.scales]
        lines.append([
            row, f"{rebuilt['psnr']:.2f}", f"{rebuilt['frechet']:.3f}", f"{found[0]['outputs']}",
            f"{of_seeds([sum(f['bits']) for f in found], 1)} of {sum(possible):,}",
            *[of_seeds([f[key] for f in found], 3) for key in ("frechet", "in_class", "cool")]])
        shares = np.mean([f["bits"] for f in found], 0) / possible
        curves[row] = list(zip(tokenizer.scales, shares.tolist()))
    floor = f"{trial.measure('held-out', 0, trial.floor)['frechet']:.3f}"
    lines.append(["held-out images", "", floor, "", "", floor, "", floor])
    show(["codes", "PSNR, dB", "Fréchet, rebuilt", "outputs", "bits an image", "Fréchet, samples",
          "in class", f"Fréchet, cooled to {args.cool:g}"], lines, trial.headline())
    path = trial.folder / "infinity.png"
    plots.save_curve(path, curves, title="bits spent of bits possible", x_label="side of the map",
                     size=(1000, 400))
    print("wrote", path)


if __name__ == "__main__":
    one_line(main)
