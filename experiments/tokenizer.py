"""Which way of learning codes wins? One tokenizer per row, everything else equal.

    python experiments/tokenizer.py --tokenizer-steps 2000              built-in shapes, V = 512
    python experiments/tokenizer.py --dataset cifar10 --vocab-size 1024
    python experiments/tokenizer.py --dataset FOLDER --image-size 256 --rows "EMA + revival"
    python experiments/tokenizer.py --dataset cifar10 --rows "EMA + revival" adversarial
    python experiments/tokenizer.py --dataset cifar10 --rows "EMA + revival" "V = 512" --judge 2000

Every row is a short training with chapter 5's own loop, then its evaluation on held-out pictures.
Prints a table for the README and writes side_by_side.png; keeps runs in out/study/, so rows that
are there are not run again. --judge N adds the Frechet distance of N reconstructions from N
pictures to train on, by the judge of chapter 6. All other options go to 05_train.py.
"""
import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine import BadInput  # noqa: E402
from engine.devices import choose_precision  # noqa: E402
from engine.options import one_line  # noqa: E402
from engine.processes import Processes  # noqa: E402
from engine.run_folder import RunFolder  # noqa: E402
from engine.stop import StopSignal  # noqa: E402
from report import health, judge, plots  # noqa: E402
from data.batches import rows_of, sample_of, to_float  # noqa: E402

vq, training = import_module("01_vq"), import_module("05_train")


class DirectionQuantizer(vq.VectorQuantizer):
    """L2-normalised codes (ViT-VQGAN, Yu et al. 2022): the nearest by angle; length is lost."""

    def nearest(self, x):
        return super().nearest(F.normalize(x, dim=-1))

    def start_on_data(self, groups):
        super().start_on_data([F.normalize(group, dim=-1) for group in groups])

    def observe(self, groups, indices):
        super().observe([F.normalize(group, dim=-1) for group in groups], indices)

    @torch.no_grad()
    def update(self, accepted=True):
        super().update(accepted)
        self.codebook.copy_(F.normalize(self.codebook, dim=-1))


def random_start(quantizer):
    quantizer.initialised.fill_(True)


def no_revival(quantizer):
    quantizer.revive = False


# Row -> options of 05_train.py, and what no option does.
ROWS = {
    "gradient": (["--set", "learn=gradient"], [random_start, no_revival]),
    "gradient + data start": (["--set", "learn=gradient"], [no_revival]),
    "EMA + data start": ([], [no_revival]),
    "EMA + revival": ([], []),
    "L2-normalised": (["--quantizer", "direction"], []),
    "LFQ": (["--quantizer", "lfq"], []),
    "independent scales": (["--set", "residual=false"], []),
    "coarse f_hats count fully": (["--set", "coarse=1"], []),  # as in the original code
    "AdamW alone": (["--optimizer", "adamw"], []),
    "C = 16": (["--set", "latent_dim=16"], []),
    "adversarial": (["--adversarial", "1"], []),
    "adversarial 0.5": (["--adversarial", "0.5"], []),
    "adversarial 0.2": (["--adversarial", "0.2"], []),
    "V = 512": (["--vocab-size", "512"], []),
    "scales 1, 2, 4, 8": (["--set", "scales=1,2,4,8"], []),
}
ABLATION = list(ROWS)[:7]


@torch.no_grad()
def frechet(tokenizer, images, labels, held_out, dataset, count):
    """Frechet distance of reconstructions, and of the same held-out pictures themselves, from as
    many pictures to train on."""
    network = judge.judge_of(dataset, images, labels, len(np.unique(labels)))
    known = judge.extract(network, judge.batches_of(images, rows_of(len(images), count)))[0]
    rows = rows_of(len(held_out), count)
    truth = judge.extract(network, judge.batches_of(held_out, rows))[0]
    made = judge.extract(network, judge.rebuilt(tokenizer, held_out, rows))[0]
    return judge.frechet_distance(known, made), judge.frechet_distance(known, truth)


def run_row(name, options, count):
    """Train one row. -> its last evaluation (see report/health.py), pictures, reconstructions"""
    more, changes = ROWS[name]
    vq.QUANTIZERS["direction"] = DirectionQuantizer
    settings, config, _ = training.read_settings([*options, *more, "--stage", "tokenizer"])
    log = Path(settings.out) / "log.jsonl"
    held_out, _, _ = training.load_data(settings.dataset, "test", config.image_size,
                                        settings.data_dir)
    images, labels, names = training.load_data(settings.dataset, "train", config.image_size,
                                               settings.data_dir)
    processes = Processes(settings.device)
    with RunFolder(settings.out) as folder, StopSignal(processes) as stop:
        if settings.precision == "auto":
            settings.precision = choose_precision(processes, folder.settings().get("precision"))
        stage = training.TokenizerStage(settings, processes, folder, config, images, held_out,
                                        names)
        for change in changes:
            change(stage.model.quantizer)
        training.train(stage, folder, stop, vars(settings))    # nothing, if it has been trained
    tokenizer, _ = training.load_tokenizer(log.with_name("tokenizer.pt"))
    for change in changes:
        change(tokenizer.quantizer)
    image = to_float(sample_of(held_out, 1000)[::max(1, min(1000, len(held_out)) // 10)][:10])
    rebuilt = tokenizer.tokens_to_image(tokenizer.image_to_tokens(image))

    result = finished(log, settings.tokenizer_steps)
    if count:
        result["frechet"], floor = frechet(tokenizer, images, labels, held_out, settings.dataset,
                                           count)
        print(f"Frechet distance {result['frechet']:.3f}, of the originals {floor:.3f}")
    return result, image, rebuilt


def finished(log, steps):
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return next((e["held_out"] for e in entries if "held_out" in e and e["step"] == steps), None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ABLATION, metavar="NAME")
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--tokenizer-steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=Path("out/study"))
    parser.add_argument("--judge", type=int, default=0, metavar="N")
    ours, rest = parser.parse_known_args()
    if "LFQ" in ours.rows and ours.vocab_size & (ours.vocab_size - 1):
        raise BadInput(f"LFQ needs a power of two: --vocab-size {ours.vocab_size} is none")
    lines, rows = [], []
    for name in ours.rows:
        out = Path(ours.out, f"{Path(ours.dataset).name}-{ours.vocab_size}-{ours.tokenizer_steps}",
                   name.replace(" ", "-"))
        options = ["--dataset", ours.dataset, "--vocab-size", str(ours.vocab_size), "--out",
                   str(out), "--tokenizer-steps", str(ours.tokenizer_steps), *rest]
        if name == "LFQ":                                  # V = 2**C: as many signs as log2(V)
            options += ["--set", f"latent_dim={ours.vocab_size.bit_length() - 1}"]
        print(f"== {name}", flush=True)
        result, image, rebuilt = run_row(name, options, ours.judge)
        rows += [rebuilt] if rows else [image, rebuilt]
        scales = training.read_settings(options)[1].scales
        own = training.read_settings([*options, *ROWS[name][0]])[1].scales
        each = {side: f"{used:.0%} / {perplexity:.0f}" for side, used, perplexity in
                zip(own, result["used"], result["perplexity"])}
        judged = [f"{result['frechet']:.3f}"] if ours.judge else []
        lines.append([name, f"{result['psnr']:.2f}", *judged, f"{result['used_overall']:.0%}",
                      f"{result['perplexity_overall']:.0f}",
                      *[each.get(side, "") for side in scales]])
    head = ["codes", "PSNR, dB", *["Frechet"] * bool(ours.judge), "used", "perplexity",
            *[f"{s}x{s}" for s in scales]]
    print(f"\n{ours.dataset}, V = {ours.vocab_size}, {ours.tokenizer_steps} steps, torch "
          f"{torch.__version__}; per scale: codes used / perplexity; sides above 4 should use half")
    for line in [head, ["---"] * len(head), *lines]:
        print("| " + " | ".join(line) + " |")
    plots.save_grid(out.parent / "side_by_side.png", (torch.cat(rows) + 1) / 2, len(image),
                       row_labels=["original"] + [
                           f"{name}, {health.psnr(image, row).mean():.1f} dB"
                           for name, row in zip(ours.rows, rows[1:])])
    print("wrote", out.parent / "side_by_side.png")


if __name__ == "__main__":
    one_line(main)
