"""Bitwise modelling: 2^32 codes at the price of 64 outputs (Infinity, Han et al. 2025).

    python experiments/infinity.py                                       shapes

A softmax needs one output per code. Infinity keeps the sign of each channel instead, and
predicts all signs of a vector at once:

    vector (0.9, -0.1, 0.2, ...) --> bits 1 0 1 ...    `bits` tokens at one position
    softmax     2^bits outputs per position            512 | 65,536 | 4,294,967,296
    bitwise     2 logits per bit                        18 |     32 |            64

The rows "2^9" model the same tokens and show what is lost when the bits of a vector no
longer depend on each other. In self-correction, bits flip at random in training; finer maps
quantize what f misses after the flip, so they learn to correct mistakes:

    rate_k ~ {0, 0.01 .. 0.30};  label_k = sign(f - f_hat);  f_hat += codes(flipped label_k)

Shapes: f (B, C, h, w), C = bits; tokens: list of K (B, n_k * bits), the bits of a position
side by side; logits (B, L * bits, 2). So V = 2, and chapters 2 to 6 take bits for tokens.
"""
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.batches import to_float, view_of
from engine.device import autocast
from engine.optimizers import make_optimizers, set_schedule, take_step
from engine.progress import progress
from experiments.trial import (CPU, Trial, cells, run_main, training, transformer,
                               trial_parser, vq)


class BitQuantizer(vq.LookupFreeQuantizer):
    """A vector is `bits` tokens of two values each, and not one index of that many bits."""

    def nearest(self, x):                                  # (..., n, C) -> (..., n * C)
        return (x > 0).long().flatten(-2)

    def lookup(self, tokens):                              # (..., n * C) -> (..., n, C)
        return (2 * tokens.unflatten(-1, (-1, self.dim)) - 1) * self.size


# Row -> channels whose signs are kept (0: vectors), highest rate of flips (None: softmax)
ROWS = {"512 vectors, softmax": (0, None), "2^9, softmax": (9, None),
        "2^9, bitwise": (9, 0.0), "2^16, bitwise": (16, 0.0), "2^32, bitwise": (32, 0.0),
        "2^16, flips to 30%": (16, 0.3)}
vq.QUANTIZERS["bits"] = lambda vocab_size, dim, learn: BitQuantizer(dim)


class BitwiseVAR(transformer.VAR):
    """Chapter 4's transformer, but a position predicts all bits of a vector at once."""

    def __init__(self, config):
        super().__init__(replace(config, vocab_size=2 * config.latent_dim))

    def predict(self, x, conditioning):                    # (B, n, D) -> (B, n * bits, 2)
        return super().predict(x, conditioning).unflatten(2, (-1, 2)).flatten(1, 2)


@torch.no_grad()
def flipped_rounds(tokenizer, f, rates):
    """Algorithm 1 in which a share rates (B, K) of the bits is wrong. f (B, C, h, w) ->
    the right bits given the mistakes so far (B, n), teacher inputs (B, L - 1, C)"""
    f_hat, labels, inputs = torch.zeros_like(f), [], []
    for k in range(tokenizer.K):
        bits = tokenizer.quantizer.nearest(tokenizer.downsample_to(f - f_hat, k))
        flips = torch.rand(bits.shape) < rates[:, k, None]             # (B, n_k * bits)
        f_hat, next_input = tokenizer.next_input(k, f_hat, bits ^ flips)
        labels.append(bits)
        inputs.append(next_input)
    return torch.cat(labels, 1), torch.cat(inputs[:-1], 1)


def bit_losses(var, classes, inputs, bits):
    """classes (B,), inputs (B, L - 1, C), bits (B, n) -> cross-entropy in nats (B, n)"""
    logits = var(classes, inputs)                                      # (B, n, 2)
    return F.cross_entropy(logits.mT.float(), bits, reduction="none")


def train_bitwise(trial, row, seed, tokenizer, most):
    """Train with f itself, because flips change it. most: the highest rate of flips"""
    settings, (images, labels) = trial.begin(row, seed), trial.data["train"]
    var = BitwiseVAR(training.var_config(settings, tokenizer.config, len(trial.names)))
    optimizers = make_optimizers(var, settings.lr, settings.weight_decay,
                                 settings.optimizer, settings.precision)
    steps = settings.steps
    for step in progress(range(steps), steps, f"steps of {row}", size=lambda step: 1):
        set_schedule(optimizers, step / steps, training.learning_rate(step / steps, 0.0))
        indices = training.batch_indices(step, len(labels), settings.batch_size, seed + 1)
        image = to_float(torch.from_numpy(images[indices]))            # (B, 3, H, W)
        image = view_of(image, step % settings.views, indices, len(labels))
        rates = torch.randint(round(100 * most) + 1, (len(image), tokenizer.K)) / 100
        with autocast(CPU, settings.precision):
            f = tokenizer.encode(image)                                # (B, C, h, w)
        bits, inputs = flipped_rounds(tokenizer, f.float(), rates)
        with autocast(CPU, settings.precision):
            loss = bit_losses(var, torch.from_numpy(labels[indices]), inputs, bits).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(var.parameters(), settings.clip)
        take_step(optimizers, norm, 0)
    return var.eval().requires_grad_(False)


def main():
    parser = trial_parser(__doc__, "shapes", steps=1200, tokenizer_steps=2000, n=2000,
                          seeds=2)
    trial, lines = Trial("infinity", parser.parse_args()), []
    for row, (bits, flips) in ROWS.items():
        changes = dict(quantizer="bits", vocab_size=2, latent_dim=bits) if bits else {}
        tokenizer, found = trial.train_tokenizer(f"2^{bits}", 0, **changes), []
        rebuilt = trial.reconstructed(f"2^{bits}", tokenizer)
        if row == "2^9, softmax":         # the same weights, but one token per position
            tokenizer.quantizer = vq.LookupFreeQuantizer(bits)
            tokenizer.config = replace(tokenizer.config, vocab_size=2 ** bits)
        for seed in trial.seeds:
            def compute():
                var = (trial.train(row, seed, tokenizer) if flips is None else
                       train_bitwise(trial, row, seed, tokenizer, flips))
                return dict(trial.judged(tokenizer, var, seed, cfg=0.0),
                            bits=trial.bits(tokenizer, var))
            found.append(trial.measure(row, seed, compute))
        outputs = 512 if flips is None else 2 * bits
        spent, *others = cells(found, dict(bits=1, frechet=3, recall=2, in_class=1))
        spent += f" of {(bits or 9) * 130:,}"
        before = cells([rebuilt], dict(psnr=2, frechet=3))
        lines.append([row, *before, f"{outputs}", spent, *others])
    floor, recall = cells([trial.floor()], dict(frechet=3, recall=2))
    lines.append(["held-out images", "", floor, "", "", floor, recall, ""])
    trial.show(["codes", "PSNR, dB", "Fréchet, rebuilt", "outputs", "bits per image",
                "Fréchet, samples", "recall", "in class, %"], lines)


if __name__ == "__main__":
    run_main(main)
