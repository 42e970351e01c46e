"""The paper's ablation: from raster order to a next-scale model with all its parts, row by row.

    python experiments/ablation.py --data-dir DIR --steps 1200       three classes of CIFAR-10
    python experiments/ablation.py --dataset shapes --steps 1200
    python experiments/ablation.py --data-dir DIR --steps 4000 --rows "+ q/k norm" "raster, all"

    raster          one 8x8 map, 64 tokens drawn one after the other; the class is the first token
    next scale      six maps, 130 tokens in 6 steps; still no more of the class than that
    + AdaLN         the class steers every block
    + top-k         a token is drawn among the likeliest fifth of the codes
    + guidance      1.5, as the original code
    + q/k norm      queries and keys of length 1
    larger          more blocks, and wider ones
    raster, all     raster order with all that was added, of the size before "larger"
    raster, early   the same after as many steps, and images, as the other rows have

From "next scale" to "larger" every row has what the rows above it have. They are the rows of VAR
(Tian et al. 2024, section 5) at the size of a laptop. Raster order has about half as many tokens an
image and is trained on as many more images, so all rows but "larger" and the last take equal
arithmetic. The class of a block (AdaLN) takes parameters, but arithmetic only once an image. Both
tokenizers are trained as long; a seed is that of the transformer. The Fréchet distances of their
reconstructions, which no sample can be expected to beat, are printed. Guidance grows in equal steps
over the maps, which are 64 in raster order.

Shapes: tokens of raster order, a list of 64 (B, 1); of next scale, a list of 6 (B, h_k*w_k).
"""
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.trial import Trial, of_seeds, parameters, read_arguments, show  # noqa: E402
from engine.options import one_line  # noqa: E402
from report import plots  # noqa: E402

training, drawing = import_module("05_train"), import_module("06_sample_and_edit")
transformer = import_module("04_var_transformer")

LARGER = ["--depth", "6", "--set", "width=160", "heads=5"]
TOP_K, CFG = 100, 1.5
ROWS = ("raster", "next scale", "+ AdaLN", f"+ top-k {TOP_K}", f"+ guidance {CFG}", "+ q/k norm",
        "larger", "raster, all", "raster, early")


class Raster(torch.nn.Module):
    """A tokenizer of one map, as the tokenizer of as many maps of one token: chapter 3's mask is
    then the triangle of raster order, and chapters 4 to 6 need not know. Each input is the code of
    the token before."""

    def __init__(self, tokenizer):
        super().__init__()
        (side,) = tokenizer.scales
        self.tokenizer, self.scales, self.K = tokenizer, (1,) * side ** 2, side ** 2
        self.config = SimpleNamespace(scales=self.scales, vocab_size=tokenizer.config.vocab_size,
                                      latent_dim=tokenizer.config.latent_dim)

    def teacher_inputs(self, tokens):
        """64 tokens (B, 1) -> codes of all but the last (B, 63, C)"""
        return self.tokenizer.quantizer.lookup(torch.cat(tokens[:-1], 1))

    def next_input(self, k, f_hat, tokens_k):
        """There is no sum to keep. -> (0, the code just drawn (B, 1, C), None after the last)"""
        return 0, self.tokenizer.quantizer.lookup(tokens_k) if k + 1 < self.K else None

    def tokens_to_image(self, tokens):
        return self.tokenizer.tokens_to_image([torch.cat(tokens, 1)])


class ClassToken(transformer.VAR):
    """The class is what the first map starts from and nothing else: every block has the same
    learnt scales, shifts and gates for all classes."""

    def __init__(self, config):
        super().__init__(config)
        del self.shared_modulation, self.head_modulation
        self.head_offset = torch.nn.Parameter(torch.zeros(1, 1, 2, config.width))

    def conditioning(self, labels):
        blocks = [block.modulation_offset for block in self.blocks]
        return transformer.Conditioning(self.class_embed(labels)[:, None], blocks,
                                        self.head_offset)


class ClassTokenStage(training.TransformerStage):
    model_class = ClassToken


def rows_of(trial):
    """-> {row: (folder, tokenizer, options and stage of the training, options of sampling)}"""
    next_scale = trial.tokenizer()
    alike = str(trial.args.tokenizer_steps or trial.tokenizer_steps())
    one_map = Raster(trial.train_tokenizer("raster", 0, ["--tokenizer-steps", alike, "--set",
                                                         "scales=8"]))
    steps = trial.args.steps * sum(side * side for side in next_scale.scales) // one_map.K
    plain, normed = ["--set", "shared_adaln=true", "qk_norm=false"], ["--set", "shared_adaln=true"]
    token, adaln = ClassTokenStage, training.TransformerStage
    k, guided = dict(top_k=TOP_K), dict(top_k=TOP_K, cfg=CFG)
    return dict(zip(ROWS, (
        ("raster", one_map, [*plain, "--steps", str(steps)], token, {}),
        ("next-scale", next_scale, plain, token, {}),
        ("adaln", next_scale, plain, adaln, {}),
        ("adaln", next_scale, plain, adaln, k),
        ("adaln", next_scale, plain, adaln, guided),
        ("qk-norm", next_scale, normed, adaln, guided),
        ("larger", next_scale, [*normed, *LARGER], adaln, guided),
        ("raster-all", one_map, [*normed, "--steps", str(steps)], adaln, guided),
        ("raster-short", one_map, normed, adaln, guided)), strict=True))


def measure(trial, row, folder, tokenizer, options, stage, sampling):
    """-> (figures of each seed, model of the last seed)"""
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    tokens, found = trial.tokens(inner), []
    for seed in trial.seeds:
        var = trial.train(folder, seed, tokenizer, options, stage, tokens)
        # Rows that differ in sampling share a training, but not what is measured.
        found.append(trial.measure(f"{folder}/{row}", seed, lambda: {
            **trial.bits(tokenizer, var, tokens),
            **trial.judged(tokenizer, var, seed, **sampling)}))
    return found, var


def milliseconds_alone(tokenizer, var, sampling, count=10):
    """Of the CPU, for an image that is drawn without others: steps cost more than tokens then."""
    times = []
    for _ in range(count):
        begin = time.process_time()
        drawing.generate(tokenizer, var, torch.tensor([0]), **sampling)
        times.append(1000 * (time.process_time() - begin))
    return sorted(times)[count // 2]                       # the first one is slow


def main():
    args = read_arguments(__doc__, more=[("--rows", dict(
        nargs="+", choices=ROWS, default=ROWS, metavar="ROW",
        help="only these; the tokenizer of raster order is trained all the same [all]"))])
    trial = Trial("ablation", args)
    rows, lines, pictures = rows_of(trial), [], []
    for row in args.rows:
        folder, tokenizer, options, stage, sampling = rows[row]
        sampling = {"cfg": 0.0, **sampling}
        found, var = measure(trial, row, folder, tokenizer, options, stage, sampling)
        alone = trial.measure(f"{folder}/{row}", "alone", lambda: dict(
            milliseconds=milliseconds_alone(tokenizer, var, sampling)))
        lines.append([row, f"{parameters(var):.2f}"] + [
            of_seeds([f[key] * factor for f in found], digits) for key, factor, digits in (
                ("bits", 1, 1), ("frechet", 1, 2), ("precision", 1, 2), ("recall", 1, 2),
                ("in_class", 100, 0), ("seconds", 1000, 1))]
            + [f"{alone['milliseconds']:.0f}"])
        labels = torch.arange(12) % len(trial.names)
        pictures.append(drawing.generate(
            tokenizer, var, labels, generator=torch.Generator().manual_seed(0), **sampling))
    for name, tokenizer in (("raster", rows["raster"][1].tokenizer),
                            ("next scale", rows["next scale"][1])):
        found = trial.measure(f"reconstructed, {name}", 0, lambda: trial.reconstructed(tokenizer))
        lines.append([f"reconstructions, {name}, {found['psnr']:.1f} dB", "", ""] + [
            f"{found[key]:.2f}" for key in ("frechet", "precision", "recall")] + ["", "", ""])
    floor = trial.measure("held-out images", 0, trial.floor)
    lines.append(["held-out images", "", ""] + [
        f"{floor[key]:.2f}" for key in ("frechet", "precision", "recall")] + ["", "", ""])
    show(["", "parameters, M", "bits an image", "Fréchet", "precision", "recall", "in class, %",
          "CPU ms an image, 100 at once", "one alone"], lines, trial.headline())
    path = trial.folder / "ablation.png"
    plots.save_grid(path, torch.cat(pictures), 12, row_labels=args.rows,
                    column_labels=[trial.names[c] for c in labels])
    print("wrote", path)


if __name__ == "__main__":
    one_line(main)
