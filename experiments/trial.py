"""What the experiments share: data, tokens, training of a row, judging of its samples, the table.

    trial = Trial("ablation", arguments)
    tokenizer = trial.tokenizer()
    found = trial.row("depth 4", seed, tokenizer, options=["--depth", "4"], cfg=1.5)

A row is a short training of chapter 5's second stage on tokens that all rows share, then its
measures on held-out images and on samples. What a row has found is kept in its folder, so the same
command resumes where it stopped, and a second one only prints the table again.

The default data are three classes of CIFAR-10 and the tokenizer that comes with the code; then
stage 1 takes no time. `--dataset shapes` needs no data. `--quick` uses few images and steps: it
shows that the script works, and its figures mean nothing.
"""
import json
import math
import sys
import time
from dataclasses import asdict
from functools import cached_property
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.batches import to_float  # noqa: E402
from data.registry import load_data, load_splits  # noqa: E402
from data.views import Views  # noqa: E402
from engine.checkpoints import model_fingerprint  # noqa: E402
from engine.devices import choose_precision  # noqa: E402
from engine.files import write_atomically  # noqa: E402
from engine.options import OneLineParser, number  # noqa: E402
from engine.processes import Processes  # noqa: E402
from engine.run_folder import RunFolder  # noqa: E402
from engine.stop import StopSignal  # noqa: E402
from report import health, judge  # noqa: E402

training, drawing = import_module("05_train"), import_module("06_sample_and_edit")

# Data set -> where an experiment starts: options of 05_train.py. In the loss all tokens count
# alike, as in the paper (loss_weights.py asks whether they should).
BASES = {
    "cifar10": ["--preset", "cifar10-cpu", "--depth", "4", "--set", "width=128", "heads=4",
                "drop_path=0", "side_power=0", "--batch-size", "32"],
    "shapes": ["--dataset", "shapes", "--set", "side_power=0"],
}
AT_ONCE = 100                                              # images drawn together


def read_arguments(doc, argv=None, *, dataset="cifar10", steps=3000, n=3000, seeds=2,
                   tokenizer_steps=None, more=()):
    """The options of an experiment. doc: its docstring; steps: 0 if it trains no transformer;
    tokenizer_steps: None if it trains no tokenizers; more: (name, options of add_argument)"""
    parser = OneLineParser(description=doc.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dataset", choices=BASES, default=dataset, help=f"[{dataset}]")
    parser.add_argument("--data-dir", default="", help="where CIFAR-10 lies, if not in data/")
    parser.add_argument("--out", type=Path, default=Path("out/experiments"),
                        help="folder of all experiments [out/experiments]")
    parser.set_defaults(steps=0)
    if steps:
        parser.add_argument("--steps", type=number(int, 1), default=steps,
                            help=f"steps of stage 2 in each row [{steps}]")
    parser.set_defaults(tokenizer_steps=None)
    if tokenizer_steps:
        parser.add_argument("--tokenizer-steps", type=number(int, 1), default=tokenizer_steps,
                            help=f"steps of stage 1 in each row [{tokenizer_steps}]")
    parser.add_argument("--n", type=number(int, 4), default=n, help=f"samples to judge [{n}]")
    parser.add_argument("--seeds", type=number(int, 1), default=seeds,
                        help=f"{'trainings' if steps else 'drawings'} of each row [{seeds}]")
    parser.add_argument("--quick", action="store_true",
                        help="few images and steps: does the script work?")
    for name, options in more:
        parser.add_argument(name, **options)
    args = parser.parse_args(argv)
    if args.quick:
        args.dataset, args.steps, args.n, args.seeds = "shapes", min(args.steps, 3), 8, 1
        args.tokenizer_steps = 3
    return args


class Trial:
    """One experiment: its folder, its images, its judge."""

    def __init__(self, name, args):
        self.args = args
        self.shipped = ROOT / "data" / "pretrained" / f"{args.dataset}.pt"
        self.folder = args.out / name / (args.dataset + "-quick" * args.quick)
        self.options = [*BASES[args.dataset], "--data-dir", args.data_dir, "--stage",
                        "transformer", "--steps", str(args.steps or 1), "--device", "cpu"]
        if args.tokenizer_steps:
            self.options += ["--tokenizer-steps", str(args.tokenizer_steps)]
        if args.quick:
            self.options += ["--views", "1", "--depth", "2", "--set", "width=32", "heads=2",
                             "--batch-size", "8", "--precision", "float32"]
        self.settings = settings = training.read_settings(self.options)[0]
        self.all, self.data, self.names = load_splits(args.dataset, 32, args.data_dir,
                                                      settings.classes)
        if args.quick:
            self.all = self.data = {split: (images[:60], labels[:60])
                                    for split, (images, labels) in self.data.items()}
        self.processes = Processes("cpu")
        # Without training there are only samples, which chapter 6 draws in float32.
        self.precision = settings.precision if args.steps else "float32"
        if self.precision == "auto":
            self.precision = choose_precision(self.processes, None)
        self.seeds, self.found_tokens, self.dates = range(args.seeds), {}, set()

    # -- Tokens ------------------------------------------------------------------------------------

    def tokenizer(self, path=None):
        """A frozen tokenizer of chapter 5, or the one that comes with the code, in float32."""
        return training.load_tokenizer(path or self.shipped)[0].float()

    def tokenizer_steps(self):
        """How long the tokenizer that comes with the code was trained."""
        return training.load_tokenizer(self.shipped)[1]["step"]

    def train_tokenizer(self, row, seed, options=(), changes=()):
        """A tokenizer of its own, trained on all images of the data set. options: of 05_train.py;
        changes: functions that change the stage -> MultiScaleVQVAE, frozen"""
        path = self.folder / "tokenizers" / row / str(seed)
        settings, config, _ = training.read_settings(
            [*self.options, "--stage", "tokenizer", *options, "--seed", str(seed), "--out",
             str(path)])
        settings.precision = self.precision
        images = [self.all[split][0] for split in ("train", "test")]
        with RunFolder(path) as folder, StopSignal(self.processes) as stop:
            stage = training.TokenizerStage(settings, self.processes, folder, config, *images,
                                            self.names)
            for change in changes:
                change(stage)
            training.train(stage, folder, stop, {**asdict(settings), **asdict(config)})
        return stage.model.eval().requires_grad_(False)

    def tokens(self, tokenizer):
        """-> {split: (tokens (views, N, L), labels (N,))}, made once for all experiments"""
        settings = training.read_settings(self.options)[0]
        settings.precision, found = self.precision, {}
        fingerprint = model_fingerprint(tokenizer)
        if fingerprint in self.found_tokens:
            return self.found_tokens[fingerprint]
        path = self.args.out / "tokens" / f"{self.folder.name}-{fingerprint}"
        with RunFolder(path) as folder, StopSignal(self.processes) as stop:
            for split, (images, labels) in self.data.items():
                views = Views(images, settings.views if split == "train" else 1)
                found[split] = training.cache_tokens(settings, self.processes, folder, stop,
                                                     tokenizer, views, split), labels
        self.found_tokens[fingerprint] = found
        return found

    # -- One row -----------------------------------------------------------------------------------

    def train(self, row, seed, tokenizer, options=(), stage=None, tokens=None):
        """Train a transformer, or read the one that was trained. options: of 05_train.py; stage: a
        class like chapter 5's TransformerStage -> VAR in eval mode"""
        path = self.folder / row / str(seed)
        settings, _, sizes = training.read_settings(
            [*self.options, *options, "--seed", str(seed), "--out", str(path)])
        settings.precision = self.precision
        sizes = training.var_sizes(sizes, tokenizer.config, len(self.names))
        tokens = tokens or self.tokens(tokenizer)
        print(f"== {row}, seed {seed}", flush=True)
        with RunFolder(path) as folder, StopSignal(self.processes) as stop:
            run = (stage or training.TransformerStage)(settings, self.processes, tokenizer, sizes,
                                                       tokens, self.names)
            training.train(run, folder, stop, {**asdict(settings), **asdict(sizes)})
        return run.model.eval().requires_grad_(False)

    def measure(self, row, seed, compute, **asked):
        """compute() -> dict of numbers; kept in the row's folder for these options, and for what
        else they depend on (asked: plain values)."""
        path, today = self.folder / row / f"{seed}.json", time.strftime("%Y-%m-%d")
        asked |= {name: getattr(self.args, name) for name in ("steps", "n")}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["asked"] == asked and "date" in kept:
                self.dates.add(kept["date"])
                return kept["found"]
        found = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(json.dumps(dict(asked=asked, date=today, found=found)), path)
        self.dates.add(today)
        print(f"   {row}, seed {seed}: " + "  ".join(f"{k} {v:.4g}" for k, v in found.items()
                                                     if isinstance(v, float)), flush=True)
        return found

    def row(self, name, seed, tokenizer, *, options=(), stage=None, **sampling):
        """Train a transformer, weigh held-out images and judge samples. -> dict"""
        var = self.train(name, seed, tokenizer, options, stage)
        return self.measure(name, seed, lambda: {
            **self.bits(tokenizer, var), **self.judged(tokenizer, var, seed, **sampling)})

    # -- Measures ----------------------------------------------------------------------------------

    @cached_property
    def network(self):
        """The judge, of all classes of the data set."""
        images, labels = self.all["train"]
        classes = int(labels.max()) + 1
        if self.args.quick:
            return judge.train_judge(images, labels, classes, steps=3, log=lambda text: None)
        return judge.judge_of(self.args.dataset, images, labels, classes)

    @cached_property
    def known(self):
        """Features of n training images, which all distances are measured from."""
        images = self.data["train"][0]
        rows = judge.rows_of(len(images), min(self.args.n, len(images)))
        return judge.extract(self.network, judge.batches_of(images, rows))[0]

    def distance(self, batches, names=None):
        """batches of images, names: classes meant -> dict of the judge's figures"""
        found, logits = judge.extract(self.network, batches)
        precision, recall = judge.precision_recall(self.known, found)
        figures = dict(frechet=judge.frechet_distance(self.known, found), precision=precision,
                       recall=recall)
        if names is not None:
            figures["in_class"] = judge.accuracy(logits, names)
        return figures

    def floor(self):
        """Held-out images measured as samples are."""
        return self.distance(judge.batches_of(*self.held_out()))

    def reconstructed(self, tokenizer):
        """Reconstructions of held-out images measured as samples are, and their PSNR in dB."""
        rebuilt = list(judge.rebuilt(tokenizer, *self.held_out()))
        db = [health.psnr(to_float(image), 2 * other - 1)
              for image, other in zip(judge.batches_of(*self.held_out()), rebuilt)]
        return dict(self.distance(rebuilt), psnr=float(torch.cat(db).mean()))

    def held_out(self):
        images = self.data["test"][0]
        return images, judge.rows_of(len(images), min(self.args.n, len(images)))

    def judged(self, tokenizer, var, seed=0, draw=None, **options):
        """Measure n samples. draw: a function like chapter 6's generate(), which takes options
        -> dict with frechet, precision, recall, in_class, seconds (of the CPU, per image)"""
        draw, seconds = draw or drawing.generate, 0.0
        labels = torch.arange(self.args.n) % len(self.names)
        generator = torch.Generator().manual_seed(seed)

        def batches():
            nonlocal seconds
            for part in labels.split(AT_ONCE):
                begin = time.process_time()
                images = draw(tokenizer, var, part, generator=generator, **options)
                seconds += time.process_time() - begin
                yield images
        found = self.distance(batches(), self.judge_labels()[labels])
        return dict(found, seconds=seconds / len(labels))

    def judge_labels(self):
        """The judge's index of each of our classes, which may be a few of its classes only."""
        every = load_data(self.args.dataset, "test", 32, self.args.data_dir)[2]
        return torch.tensor([every.index(name) for name in self.names])

    def bits(self, tokenizer, var, tokens=None):
        """-> dict: bits of a held-out image given its class, and by scale"""
        tokens, labels = (tokens or self.tokens(tokenizer))["test"]
        sizes, parts = [side * side for side in tokenizer.scales], []
        for rows in np.array_split(np.arange(len(labels)), -(-len(labels) // AT_ONCE)):
            maps = torch.from_numpy(tokens[0, rows].astype(np.int64)).split(sizes, 1)
            parts.append(drawing.log_likelihood(tokenizer, var, list(maps),
                                                torch.from_numpy(labels[rows])))
        per_scale = -torch.cat(parts).double().mean(0) / math.log(2)
        return dict(bits=float(per_scale.sum()), bits_per_scale=per_scale.tolist())

    # -- The table ---------------------------------------------------------------------------------

    def headline(self):
        """What every table says of itself. Its dates are those of its first and last figures."""
        args, dates = self.args, sorted({min(self.dates), max(self.dates)})
        trained = f"{args.steps} steps" if args.steps else "the shipped model"
        return (f"{args.dataset}, {trained}, {args.n} samples, {args.seeds} seed(s), "
                f"{self.precision}, torch {torch.__version__}, {torch.get_num_threads()} "
                f"thread(s), {' to '.join(dates)}")


def parameters(model):
    """Millions of parameters"""
    return sum(p.numel() for p in model.parameters()) / 1e6


def of_seeds(values, digits=2):
    """[1.52, 1.60] -> "1.56 +- 0.04": the mean, and half of the range"""
    mean, half = np.mean(values), (max(values) - min(values)) / 2
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def show(head, lines, headline):
    """Print a table for experiments/README.md."""
    print(f"\n{headline}\n")
    for line in [head, ["---"] * len(head), *lines]:
        print("| " + " | ".join(line) + " |")
    print(flush=True)
