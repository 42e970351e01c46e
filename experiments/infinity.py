"""Bitwise modelling: 2^32 codes at the price of 64 outputs (Infinity, Han et al. 2025).

    python experiments/infinity.py                                       shapes

A softmax needs one output per code. Infinity keeps the sign of each channel instead, and
predicts all signs of a vector at once, with two logits per bit. The rows "2^9" model the
same tokens and show what is lost when the bits of a vector no longer depend on each other.

Shapes: f (B, C, h, w), C = bits; tokens: list of K (B, n_k * bits), the bits of a position
side by side; logits (B, L * bits, 2). So V = 2, and chapters 2 to 6 take bits for tokens.
"""
from dataclasses import replace

import torch
import torch.nn.functional as F

from trial import CPU, JUDGED, Trial, run_main, training, transformer, trial_parser, vq
from data.batches import to_float, view_of
from engine.device import autocast
from engine.optimizers import make_optimizers, set_schedule, take_step
from engine.progress import progress


class BitQuantizer(vq.LookupFreeQuantizer):
    """A vector is `bits` tokens of two values each, and not one index of that many bits."""

    def nearest(self, x):                                  # (..., n, C) -> (..., n * C)
        return (x > 0).long().flatten(-2)

    def lookup(self, tokens):                              # (..., n * C) -> (..., n, C)
        return (2 * tokens.unflatten(-1, (-1, self.dim)) - 1) * self.size


vq.QUANTIZERS["bits"] = lambda vocab_size, dim, learn: BitQuantizer(dim)
# Row -> channels whose signs are kept (0: vectors)
ROWS = {"512 vectors, softmax": 0, "2^9, softmax": 9, "2^9, bitwise": 9,
        "2^16, bitwise": 16, "2^32, bitwise": 32}


class BitwiseVAR(transformer.VAR):
    """Chapter 4's transformer, but a position predicts all bits of a vector at once."""

    def __init__(self, config):
        super().__init__(replace(config, vocab_size=2 * config.latent_dim))

    def predict(self, x, conditioning):                    # (B, n, D) -> (B, n * bits, 2)
        return super().predict(x, conditioning).unflatten(2, (-1, 2)).flatten(1, 2)


def bit_losses(var, classes, inputs, bits):
    """classes (B,), inputs (B, L - 1, C), bits (B, n) -> cross-entropy in nats (B, n)"""
    logits = var(classes, inputs)                                      # (B, n, 2)
    return F.cross_entropy(logits.mT.float(), bits, reduction="none")


def train_bitwise(trial, row, seed, tokenizer):
    """Chapter 5's loop, without a cache, which would hold every bit as a token."""
    settings, (images, labels) = trial.begin(row, seed), trial.data["train"]
    var = BitwiseVAR(training.config_of(transformer.VARConfig, tokenizer.config, settings,
                                        num_classes=len(trial.names)))
    optimizers = make_optimizers(var, settings.lr, settings.weight_decay,
                                 settings.optimizer, settings.precision)
    steps = settings.steps
    for step in progress(range(steps), steps, f"steps of {row}", size=lambda step: 1):
        set_schedule(optimizers, step / steps, training.learning_rate(step / steps, 0.0))
        indices = training.batch_indices(step, len(labels), settings.batch_size, seed + 1)
        image = to_float(torch.from_numpy(images[indices]))            # (B, 3, H, W)
        image = view_of(image, step % settings.views, indices, len(labels))
        with autocast(CPU, settings.precision):
            bits = tokenizer.image_to_tokens(image)                    # K maps (B, n_k * C)
            loss = bit_losses(var, torch.from_numpy(labels[indices]),
                              tokenizer.teacher_inputs(bits), torch.cat(bits, 1)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(var.parameters(), settings.clip)
        take_step(optimizers, norm, 0)
    return var.eval().requires_grad_(False)


def main():
    parser = trial_parser(__doc__, "shapes", steps=1200, tokenizer_steps=2000, n=2000,
                          seeds=2)
    trial, rows = Trial("infinity", parser.parse_args()), {}
    for row, bits in ROWS.items():
        changes = dict(quantizer="bits", vocab_size=2, latent_dim=bits) if bits else {}
        tokenizer = trial.train_tokenizer(f"2^{bits}", 0, **changes)
        rebuilt = trial.reconstructed(f"2^{bits}", tokenizer)
        facts = dict(psnr=rebuilt["psnr"], rebuilt=rebuilt["frechet"],
                     outputs=2 * bits if "bitwise" in row else 512,
                     possible=130 * (bits or 9))
        if row == "2^9, softmax":         # the same weights, but one token per position
            tokenizer.quantizer = vq.LookupFreeQuantizer(bits)
            tokenizer.config = replace(tokenizer.config, vocab_size=2 ** bits)
        train = train_bitwise if "bitwise" in row else Trial.train
        rows[row] = []
        for seed in trial.seeds:
            def compute():
                var = train(trial, row, seed, tokenizer)
                return dict(trial.judged(tokenizer, var, seed, cfg=0.0),
                            bits=sum(trial.bits(tokenizer, var)))
            rows[row].append(trial.measure(row, seed, compute) | facts)
    rows["held-out images"] = [trial.floor()]
    trial.show("codes", {
        "PSNR, dB": ("psnr", 2), "Fréchet, rebuilt": ("rebuilt", 3),
        "outputs": ("outputs", 0), "bits possible": ("possible", 0),
        "bits per image": ("bits", 1), **JUDGED}, rows)


if __name__ == "__main__":
    run_main(main)
