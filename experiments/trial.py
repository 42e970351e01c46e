"""Shared by all experiments: data, tokens, a training run per row, the judge, the table.
A script imports this file first, because it lets Python find data, engine and report.

Training runs and measurements are kept in out/experiments/, so the same command resumes
where it was stopped. After a change of the code use another --out.
"""
import json
import math
import sys
import time
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.batches import rows_of, to_float
from data.registry import load_splits
from engine.checkpoints import save_atomically
from engine.device import best_precision
from engine.options import Parser, number, run_main
from report import health, judge, plots

vq, vqvae = import_module("01_vq"), import_module("02_multiscale_vqvae")
transformer, training = import_module("04_var_transformer"), import_module("05_train")
drawing = import_module("06_sample_and_edit")

CPU = torch.device("cpu")
AT_ONCE = 100                             # images drawn or scored together
# --dataset -> settings of chapter 5 to start from. "cifar10" is three of its classes.
BASES = {"shapes": {}, "cifar10": training.PRESETS["cifar10-cpu"] | dict(
    depth=4, width=128, heads=4, drop_path=0.0, batch_size=32)}
HELP = {"steps": "steps of each transformer", "tokenizer_steps": "steps of each tokenizer",
        "n": "samples to judge", "seeds": "training runs, or sets of samples, per row"}
# Columns for Trial.show(): what Trial.judged() measures
JUDGED = {"Fréchet": ("frechet", 3), "precision": ("precision", 2), "recall": ("recall", 2),
          "in class, %": ("in_class", 1), "CPU ms per image": ("ms", 1)}


def quick_parser(doc):
    """doc: the docstring of a script -> Parser with --quick"""
    parser = Parser(doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images and small models")
    return parser


def trial_parser(doc, dataset="cifar10", **defaults):
    """defaults: those options in HELP that the script uses -> Parser for Trial"""
    parser = quick_parser(doc)
    parser.set_defaults(**dict.fromkeys(HELP, 0))
    parser.add_argument("--dataset", choices=BASES, default=dataset, help=f"[{dataset}]")
    parser.add_argument("--data-dir", default="", help="where CIFAR-10 is, if not in data/")
    parser.add_argument("--out", type=Path, default=Path("out/experiments"))
    for name, default in defaults.items():
        parser.add_argument("--" + name.replace("_", "-"), help=f"{HELP[name]} [{default}]",
                            type=number(int, 4 if name == "n" else 1), default=default)
    return parser


class Trial:
    """One experiment on the CPU: its folder, its images, its judge."""

    def __init__(self, name, args):
        if args.quick:
            vars(args).update(dataset="shapes", steps=3, tokenizer_steps=3, n=8, seeds=1)
        self.args, self.seeds = args, range(args.seeds)
        kind = f"{args.dataset}-{args.tokenizer_steps}-{args.steps}"
        self.folder = args.out / name / kind
        self.shipped = ROOT / "data" / "pretrained" / f"{args.dataset}.pt"
        chosen = self.folder / "precision"                 # the same when it resumes
        if not chosen.exists():
            save_atomically(best_precision(CPU), chosen)
        self.settings = training.Settings(**BASES[args.dataset] | dict(
            steps=args.steps, tokenizer_steps=args.tokenizer_steps,
            precision=chosen.read_text()))
        self.all, self.data, self.names = load_splits(
            self.settings.dataset, self.settings.image_size, args.data_dir,
            self.settings.classes)
        if args.quick:
            self.all = self.data = {split: (images[:60], labels[:60])
                                    for split, (images, labels) in self.all.items()}

    def begin(self, row, seed, **changes):
        """Seed torch for a row. -> its settings of chapter 5, with a folder of its own"""
        print(f"== {row}, seed {seed}", flush=True)
        torch.manual_seed(seed)
        folder = str(self.folder / row / str(seed))
        return replace(self.settings, out=folder, seed=seed, **changes)

    def train_tokenizer(self, row, seed, config=None, **changes):
        """Train a tokenizer on all images of the data set, or load it if it was trained.
        config: fields of TokenizerConfig; changes: of Settings -> frozen MultiScaleVQVAE"""
        settings = self.begin(f"tokenizers/{row}", seed, **changes)
        sizes = training.config_of(vqvae.TokenizerConfig, settings, **(config or {}))
        tokenizer = vqvae.MultiScaleVQVAE(sizes)
        training.train_tokenizer(settings, tokenizer, self.all, self.names, CPU)
        return tokenizer

    def train(self, row, seed, tokenizer, model=transformer.VAR, config=None, **changes):
        """Train a transformer on this tokenizer's tokens, or load it if it was trained.
        model: a class like VAR; config: fields of VARConfig; changes: of Settings"""
        settings = self.begin(row, seed, **changes)
        shared = replace(settings, out=str(self.folder))   # all rows share cached tokens
        pairs = [(training.encode_once(shared, tokenizer, images, split, CPU), labels)
                 for split, (images, labels) in self.data.items()]
        var = model(training.config_of(transformer.VARConfig, tokenizer.config, settings,
                                       num_classes=len(self.names), **(config or {})))
        training.train_transformer(settings, var, tokenizer, lambda: pairs, self.names, CPU)
        return var

    def measure(self, row, seed, compute):
        """compute() -> dict of numbers, which is kept in the folder of the row"""
        path = self.folder / row / f"{seed}-{self.args.n}.json"
        if not path.exists():
            save_atomically(json.dumps(compute()), path)
        return json.loads(path.read_text())

    def held_out(self, tokenizer, data=None):
        """Batches of held-out images or other data -> tokens, K maps (B, n); labels (B,)"""
        images, labels = (torch.from_numpy(part) for part in data or self.data["test"])
        for batch, classes in zip(images.split(AT_ONCE), labels.split(AT_ONCE)):
            yield tokenizer.image_to_tokens(to_float(batch)), classes

    def bits(self, tokenizer, var, data=None):
        """-> list of K: what each map of a held-out image costs given the class, exactly"""
        nats = [-drawing.log_likelihood(tokenizer, var, *batch)
                for batch in self.held_out(tokenizer, data)]
        return (torch.cat(nats).mean(0) / math.log(2)).tolist()

    def some(self, split):
        """-> images of a split, and up to n of its rows"""
        images = self.data[split][0]
        return images, rows_of(len(images), self.args.n)

    @cache
    def judge(self, augment=True):
        """-> a judge of these classes, its features of n training images. augment: teach it
        to overlook blur, dimming and shifts"""
        facts = *self.data["train"], len(self.names)
        network = judge.judge_of(self.settings.dataset, *facts, augment=augment,
                                 steps=3 if self.args.quick else None)
        return network, judge.extract(network, judge.batches_of(*self.some("train")))[0]

    def compare(self, batches, labels=None, augment=True):
        """Images against training images. labels: the classes that were meant; augment: see
        judge() -> dict with frechet, precision, recall, and with labels in_class, in %"""
        network, real = self.judge(augment)
        features, logits = judge.extract(network, batches)
        precision, recall = judge.precision_recall(real, features)
        found = dict(precision=precision, recall=recall,
                     frechet=judge.frechet_distance(real, features))
        if labels is not None:
            found["in_class"] = 100 * judge.accuracy(logits, labels)
        return found

    def floor(self):
        """Held-out images, compared as samples are: samples can hardly do better."""
        found = self.measure("held-out images", 0, lambda: self.compare(
            judge.batches_of(*self.some("test"))))
        return dict(found, rebuilt=found["frechet"], plain=found["frechet"])

    def reconstructed(self, name, tokenizer, seed=0):
        """Reconstructions of held-out images, compared like samples, and their PSNR."""
        def compute():
            image = to_float(torch.cat(list(judge.batches_of(*self.some("test")))))
            rebuilt = torch.cat(list(judge.rebuilt(tokenizer, *self.some("test"))))
            psnr = float(health.psnr(image, 2 * rebuilt - 1).mean())
            return dict(self.compare(rebuilt.split(AT_ONCE)), psnr=psnr)
        return self.measure(f"tokenizers/{name}", seed, compute)

    def judged(self, tokenizer, var, seed=0, strict=False, **options):
        """n samples, compared with training images. options: of chapter 6's generate();
        strict: measure the distance with a second judge, too, which does not forgive blur
        -> dict as in compare(), and ms: milliseconds of the CPU per image"""
        labels = judge.labels_like(self.data["train"][1], self.args.n)
        generator, begin = torch.Generator().manual_seed(seed), time.process_time()
        samples = [drawing.generate(tokenizer, var, part, generator=generator, **options)
                   for part in labels.split(AT_ONCE)]
        ms = 1000 * (time.process_time() - begin) / len(labels)
        found = dict(self.compare(samples, labels), ms=ms)
        if strict:
            found["second"] = self.compare(samples, augment=False)["frechet"]
        return found

    def show(self, title, columns, rows):
        """Print a table, and above it how its numbers were measured. columns: {head: (name,
        digits)}, and `title` above the rows' names; rows: {name: found}, see cells()"""
        print(f"\npython {' '.join(sys.argv)}; {self.args.dataset}, trained in "
              f"{self.settings.precision}, torch {torch.__version__}\n")
        digits = dict(columns.values())
        lines = [[row, *cells(found, digits)] for row, found in rows.items()]
        show([title, *columns], lines)

    def draw(self, rows, **options):
        """Write a figure into the folder, see save_grid()."""
        plots.save_grid(self.folder / f"{self.folder.parent.name}.png", rows, **options)


def show(head, lines):
    """Print a table of texts in Markdown."""
    for line in [head, ["---"] * len(head), *lines]:
        print("| " + " | ".join(line) + " |", flush=True)


def cells(found, digits):
    """found: a dict of numbers per seed; digits: {name: digits after the point, or None for
    a text} -> cells such as "1.56 ± 0.04", mean and half of the range; "" if unknown"""
    texts = []
    for name, places in digits.items():
        values = [numbers[name] for numbers in found if name in numbers]
        if places is None or not values:
            texts.append("".join(values[:1]))
            continue
        texts.append(f"{np.mean(values):.{places}f}")
        if max(values) > min(values):
            texts[-1] += f" ± {(max(values) - min(values)) / 2:.{places}f}"
    return texts


def parameters(model):                                    # in millions
    return sum(p.numel() for p in model.parameters()) / 1e6
