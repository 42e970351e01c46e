"""Which way of learning codes wins? One tokenizer per row, everything else equal.

    python experiments/tokenizer.py                                 built-in shapes, V = 512
    python experiments/tokenizer.py --dataset cifar10 --data-dir DIR --vocab-size 1024
"""
from contextlib import nullcontext
from functools import partial

import torch.nn.functional as F

from trial import Trial, run_main, trial_parser, vq
from data.batches import sample_of, to_float
from report import health


class DirectionQuantizer(vq.VectorQuantizer):
    """Vectors and codes have length 1, so the nearest code has the nearest direction."""

    def nearest(self, x):
        return super().nearest(F.normalize(x, dim=-1))

    def start_on_data(self, groups):
        super().start_on_data([F.normalize(group, dim=-1) for group in groups])
        self.codebook.copy_(F.normalize(self.codebook, dim=-1))

    def learn(self, groups, indices):
        super().learn([F.normalize(group, dim=-1) for group in groups], indices)
        self.codebook.copy_(F.normalize(self.codebook, dim=-1))


no_revival = partial(vq.VectorQuantizer, revive=False)


def random_start(vocab_size, dim, learn):
    quantizer = no_revival(vocab_size, dim, learn)
    quantizer.initialised.fill_(True)     # so the first batch does not place the codes
    return quantizer


vq.QUANTIZERS.update({"random start": random_start, "no revival": no_revival,
                      "direction": DirectionQuantizer})
# Row -> what it changes in the settings of chapter 5, and in TokenizerConfig
ROWS = {
    "gradient": (dict(quantizer="random start", learn="gradient"), {}),
    "gradient + data start": (dict(quantizer="no revival", learn="gradient"), {}),
    "EMA + data start": (dict(quantizer="no revival"), {}),
    "EMA + revival": ({}, {}),
    "gradient + revival": (dict(learn="gradient"), {}),
    "L2-normalised": (dict(quantizer="direction"), {}),
    "LFQ": (dict(quantizer="lfq"), {}),
    "independent scales": ({}, dict(residual=False)),
    "coarse f_hats count fully": ({}, dict(coarse=1.0)),     # as in the original code
    "adversarial": (dict(adversarial=1.0), {}),
}


def main():
    parser = trial_parser(__doc__, "shapes", tokenizer_steps=2000)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS)[:8])
    parser.add_argument("--vocab-size", type=int, choices=(512, 1024, 4096), default=512)
    args = parser.parse_args()
    trial, rows, V = Trial("tokenizer", args), {}, args.vocab_size
    held_out = to_float(sample_of(trial.all["test"][0], 1000))
    image = held_out[::max(1, len(held_out) // 10)][:10]
    images = {"original": (image + 1) / 2}
    for row in args.rows:
        changes, config = dict(adversarial=0.0, vocab_size=V) | ROWS[row][0], ROWS[row][1]
        if row == "LFQ":                  # V = 2^C
            changes["latent_dim"] = V.bit_length() - 1
        name = f"{row}, V = {V}"
        tokenizer = trial.train_tokenizer(name, 0, config, **changes)
        found = trial.measure(name, 0, lambda: health.examine(
            tokenizer, held_out.split(100), nullcontext))
        sides = [f"{side}x{side}" for side in tokenizer.scales]
        for side, used, perplexity in zip(sides, found["used"], found["perplexity"]):
            found[side] = f"{used:.0%} / {perplexity:.0f}"
        rows[row] = [dict(found, used=f"{found['used_overall']:.0%}")]
        rebuilt = tokenizer.tokens_to_image(tokenizer.image_to_tokens(image))
        images[f"{row}, {health.psnr(image, rebuilt).mean():.1f} dB"] = (rebuilt + 1) / 2
    trial.show("codes", {"PSNR, dB": ("psnr", 2), "used": ("used", None),
                         "perplexity": ("perplexity_overall", 0)}
               | {side: (side, None) for side in sides}, rows)
    trial.draw(images)


if __name__ == "__main__":
    run_main(main)
