"""The parts of the paper's ablation: what does each of them add to a next-scale model?

    python experiments/ablation.py --data-dir DIR --steps 1200     three classes of CIFAR-10

Each row has all that the rows above it have (VAR, Tian et al. 2024, section 5).
"""
import torch

from trial import (JUDGED, Trial, parameters, run_main, training, transformer,
                   trial_parser)


class ClassToken(transformer.VAR):
    """Only the first map's input depends on the class; AdaLN vectors do not."""

    def __init__(self, config):
        super().__init__(config)
        del self.shared_modulation, self.head_modulation
        self.head_offset = torch.nn.Parameter(torch.zeros(1, 1, 2, config.width))

    def conditioning(self, labels):
        row = self.class_embed(labels)[:, None]                        # (B, 1, D)
        blocks = [block.modulation_offset for block in self.blocks]
        return transformer.Conditioning(row, blocks, self.head_offset)


# Row -> folder of its training run, class of the model, q/k norm, how it samples
PLAIN, TOP_K, GUIDED = dict(cfg=0.0), dict(cfg=0.0, top_k=100), dict(cfg=1.5, top_k=100)
ROWS = {
    "next scale": ("next-scale", ClassToken, False, PLAIN),
    "+ AdaLN": ("adaln", transformer.VAR, False, PLAIN),
    "+ top-k 100": ("adaln", transformer.VAR, False, TOP_K),
    "+ guidance 1.5": ("adaln", transformer.VAR, False, GUIDED),
    "+ q/k norm": ("qk-norm", transformer.VAR, True, GUIDED),
    "larger": ("larger", transformer.VAR, True, GUIDED),
}


def main():
    args = trial_parser(__doc__, steps=3000, n=3000, seeds=2).parse_args()
    trial, rows = Trial("ablation", args), {}
    tokenizer, _ = training.load_tokenizer(trial.shipped)
    for row, (folder, model, qk_norm, sampling) in ROWS.items():
        changes = dict(depth=6, width=160, heads=5) if row == "larger" else {}
        rows[row] = []
        for seed in trial.seeds:
            var = trial.train(folder, seed, tokenizer, model, dict(qk_norm=qk_norm),
                              shared_adaln=True, **changes)
            found = trial.measure(f"{folder}/{row}", seed, lambda: dict(
                trial.judged(tokenizer, var, seed, **sampling),
                bits=sum(trial.bits(tokenizer, var))))
            rows[row].append(dict(found, parameters=parameters(var)))
    rows["held-out images"] = [trial.floor()]
    rows["reconstructions"] = [trial.reconstructed("shipped", tokenizer)]
    trial.show("", {"parameters, M": ("parameters", 2), "bits per image": ("bits", 1),
                    **JUDGED}, rows)


if __name__ == "__main__":
    run_main(main)
