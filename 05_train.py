"""Chapter 5: train. Pictures -> tokenizer -> cached tokens -> transformer; one CPU to many GPUs.

    data --(stage 1)--> tokenizer --(once)--> token cache --(stage 2)--> transformer
             tokenizer.pt            tokens_train.npy          transformer.pt        all in out/NAME/

    python 05_train.py                                   built-in shapes on a CPU, minutes
    python 05_train.py --dataset cifar10                 one GPU; downloads and verifies the data
    python 05_train.py --dataset imagenet --data-dir /path/to/imagenet --gpus 8 --depth 16
    python 05_train.py --dataset /path/to/folder         class folders of your own pictures

The same command again goes on where it stopped; --fresh starts over. All settings: --help.

Shapes: image (B, 3, H, W) in [-1, 1]; token cache (views, N, L) uint16; logits (B, L, V).

Sources: VAR (Tian et al. 2024), section 4 and the released training code for the ImageNet recipe;
Muon (Jordan et al. 2024) for small models. Every random decision of step s is drawn from (seed,
stage, s, process): nothing about randomness has to be saved to go on bit for bit.

Differs from the original VAR code: stage 1 exists; tokens are computed once, not in every step.
"""
import argparse
import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data import BadInput, cifar10, folder, imagenet, pictures, shapes

vqvae = import_module("02_multiscale_vqvae")
transformer = import_module("04_var_transformer")


# -- Settings --------------------------------------------------------------------------------------

@dataclass
class Settings:
    """Everything about a run but the sizes of the two models. The comments are the --help texts."""
    dataset: str = "shapes"               # shapes, cifar10, imagenet, or the path of a folder
    data_dir: str = ""                    # where the data lies, if not in the usual place
    out: str = ""                         # folder of this run; default out/<dataset>
    stage: str = "all"                    # all, tokenizer or transformer
    device: str = "auto"                  # auto, cpu, cuda or mps
    gpus: int = 1                         # processes on this machine, one per GPU
    seed: int = 0                         # same seed, same run
    precision: str = "auto"               # auto (bfloat16 where it is fast), float32 or bfloat16
    compile: bool = False                 # torch.compile both models (pays off in long runs)
    workers: int = 4                      # processes that decode pictures, for folders
    save_every: int = 500                 # steps between checkpoints
    log_every: int = 50                   # steps between log lines
    fresh: bool = False                   # start over instead of going on
    flip: bool = False                    # mirror half of the pictures
    views: int = 1                        # cached versions per picture (mirror image, other crops)
    tokenizer_steps: int = 1000           # steps of stage 1
    tokenizer_batch_size: int = 16        # pictures per step of stage 1, over all processes
    tokenizer_lr: float = 3e-3            # peak learning rate of stage 1
    vq_weight: float = 0.25               # weight of the quantization loss against the picture loss
    steps: int = 1000                     # steps of stage 2
    batch_size: int = 16                  # pictures per step of stage 2, over all processes
    optimizer: str = "muon"               # of the block matrices: muon or adamw (the rest is adamw)
    lr: float = 1.5e-3                    # peak learning rate of adamw in stage 2
    muon_lr: float = 0.02                 # peak learning rate of muon
    weight_decay: float = 0.05            # of matrices only
    final_lr: float = 0.0                 # share of the peak learning rate left at the end
    clip: float = 2.0                     # largest gradient norm
    cfg: float = 2.0                      # default guidance when sampling from this run
    top_k: int = 0                        # default top-k when sampling (0: off)
    top_p: float = 0.0                    # default top-p when sampling (0: off)


SMALL = dict(image_size=32, scales=(1, 2, 3, 4, 6, 8), vocab_size=512, latent_dim=16)
PRESETS = {
    "shapes": dict(SMALL, depth=4, width=128, heads=4, drop_path=0.0),
    "cifar10": dict(SMALL, vocab_size=1024, flip=True, views=2, tokenizer_steps=20_000,
                    tokenizer_batch_size=64, channels=64, depth=8, width=384, heads=6,
                    steps=30_000, batch_size=128),
    "folder": dict(SMALL, image_size=64, multipliers=(1, 2, 2), vocab_size=1024, views=4,
                   tokenizer_steps=20_000, steps=30_000, tokenizer_batch_size=32, batch_size=64,
                   depth=8, width=384, heads=6),
    "imagenet": dict(vqvae.RELEASED, learn="ema", views=8, tokenizer_steps=250_000,
                     tokenizer_batch_size=256, tokenizer_lr=1e-4, optimizer="adamw", depth=16,
                     save_every=1000, cfg=1.5, top_k=900, top_p=0.96),
}


def imagenet_recipe(depth):
    """The original's schedule for a depth: epochs, batch, learning rate, weight decay."""
    batch = 1024 if depth >= 30 else 768
    epochs = 200 if depth < 20 else 250 if depth < 24 else 350
    return dict(batch_size=batch, steps=epochs * 1_281_167 // batch,
                lr=(8e-5 if depth >= 24 else 1e-4) * batch / 256,
                weight_decay=0.08 if depth >= 30 else 0.05,
                final_lr=0.01 if depth >= 24 else 0.1)


CHOICES = dict(stage=("all", "tokenizer", "transformer"), device=("auto", "cpu", "cuda", "mps"),
               precision=("auto", "float32", "bfloat16"), optimizer=("muon", "adamw"),
               quantizer=("vq", "lfq"), learn=("ema", "gradient"))
ZERO_IS_FINE = {"seed", "workers", "top_k", "tokenizer_steps", "steps", "width", "heads"}
NOT_SETTINGS = {"num_classes"}            # known from the data


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message} (see --help)")


def number(kind, low):
    """argparse type: a finite int or float that is at least `low`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= low):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {low} or more")
        return value
    return parse


def whole_numbers(text):
    """argparse type: '1,2,3' -> (1, 2, 3)"""
    return tuple(number(int, 1)(part) for part in text.split(","))


def add_options(parser, *classes):
    """One --option per dataclass field; its help is the comment beside the field."""
    done = set(NOT_SETTINGS)
    for cls in classes:
        comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(cls), re.M))
        for f in fields(cls):
            if f.name in done:
                continue
            done.add(f.name)
            kind = {int: number(int, 0 if f.name in ZERO_IS_FINE else 1), tuple: whole_numbers,
                    float: number(float, -1 if f.name == "drop_path" else 0)}.get(f.type, f.type)
            how = (dict(action=argparse.BooleanOptionalAction) if f.type is bool
                   else dict(type=kind, choices=CHOICES.get(f.name)))
            parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                                help=comments[f.name].replace("%", "%%"), **how)


def read_settings(argv=None):
    """Command line -> (Settings, TokenizerConfig, dict of VARConfig fields). Defaults, then the
    preset of the data set, then what was typed."""
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add_options(parser, Settings, vqvae.TokenizerConfig, transformer.VARConfig)
    typed = vars(parser.parse_args(argv))
    name = typed.get("dataset", "shapes")
    values = {**PRESETS.get(name, PRESETS["folder"]), **typed}
    if name == "imagenet":
        values = {**values, **imagenet_recipe(values["depth"]), **typed}

    def pick(cls):
        return {f.name: values[f.name] for f in fields(cls) if f.name in values}
    settings = Settings(**pick(Settings))
    settings.out = settings.out or os.path.join("out", Path(name).resolve().name
                                                if name not in PRESETS else name)
    config = vqvae.TokenizerConfig(**pick(vqvae.TokenizerConfig))
    for size in ("tokenizer_batch_size", "batch_size"):
        if getattr(settings, size) % settings.gpus:
            raise BadInput(f"--{size.replace('_', '-')} {getattr(settings, size)} cannot be divided "
                           f"among {settings.gpus} processes")
    return settings, config, pick(transformer.VARConfig)


# -- Where and how: devices, processes, checkpoints, the log ---------------------------------------

def pick_device(name, rank=0):
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this machine has no CUDA GPU that torch can use; try cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise BadInput("--device mps: this machine has no Apple GPU; try cpu")
    return torch.device(name, rank) if name == "cuda" else torch.device(name)


def fast_bfloat16(device):
    """Does bfloat16 pay here? GPUs: ask. CPUs: some have units for it, others emulate it ten times
    slower, so time one small product of each kind."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 512).to(dtype)
        a @ a
        begin = time.perf_counter()
        a @ a
        seconds[dtype] = time.perf_counter() - begin
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


def save_atomically(value, path):
    """Write beside, then rename: whoever reads `path` sees the old file or the new, never half."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        torch.save(value, temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load_checkpoint(path, device="cpu"):
    """A file written by this script; tensors and plain values only, so a hostile file can do no
    harm. Raises BadInput, with one line, for anything else."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such checkpoint") from None
    except Exception as error:                             # truncated, not a checkpoint, pickled code
        raise BadInput(f"{path}: not a readable checkpoint "
                       f"({type(error).__name__}); expected a file written by 05_train.py") from None
    if not isinstance(state, dict):
        raise BadInput(f"{path}: not a checkpoint of 05_train.py")
    return state


class Run:
    """One folder in out/: settings, log, checkpoints, pictures; and which process this is."""

    def __init__(self, settings):
        self.settings, self.folder = settings, Path(settings.out)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(settings.device, int(os.environ.get("LOCAL_RANK", 0)))
        if self.world > 1 and not dist.is_initialized():
            cuda = self.device.type == "cuda"
            if cuda:
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if cuda else "gloo")
        if settings.precision == "auto":
            settings.precision = "bfloat16" if fast_bfloat16(self.device) else "float32"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stop = 0
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.ask_to_stop)

    def ask_to_stop(self, number, frame):
        if self.stop:                                      # asked twice: do not wait for the step
            sys.exit(128 + number)
        self.stop = number

    def say(self, line):
        if self.rank == 0:
            print(line, flush=True)

    def log(self, entry):
        if self.rank == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")

    def forget_log_after(self, stage, step):
        """On resume: drop what was logged after the checkpoint, it will be logged again."""
        path = self.folder / "log.jsonl"
        if self.rank == 0 and path.exists():
            lines = [line for line in path.read_text().splitlines()
                     if (e := json.loads(line))["stage"] != stage or e["step"] <= step]
            path.write_text("".join(line + "\n" for line in lines))

    def seed(self, stage, step):
        """All randomness of one step, of one process."""
        parts = [self.settings.seed, ["tokenizer", "transformer"].index(stage), step, self.rank]
        torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))

    def autocast(self):
        if self.settings.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def mean(self, value):
        """Average over the processes, once. value: tensor () or (n,)"""
        if self.world > 1:
            dist.all_reduce(value := value.clone())
            value = value / self.world
        return value

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def wrap(self, model):
        """The model to train through: compiled if asked, averaged over processes if many."""
        if self.settings.compile:
            model = torch.compile(model)
        if self.world > 1:
            # Buffers are not copied from rank 0: the quantizer keeps them equal by itself.
            model = DistributedDataParallel(model, broadcast_buffers=False)
        return model


# -- Data ------------------------------------------------------------------------------------------

def load_data(settings, split, image_size):
    """-> (images, labels (N,), class_names) through the reader that the data set's name chooses."""
    reader = {"shapes": shapes, "cifar10": cifar10, "imagenet": imagenet}.get(settings.dataset)
    if reader:
        return reader.load(split, data_dir=settings.data_dir or None, size=image_size)
    if os.path.exists(settings.dataset):
        return folder.load(split, data_dir=settings.dataset, size=image_size)
    raise BadInput(f"unknown data set {settings.dataset!r}: use shapes, cifar10, imagenet or the path "
                   "of a folder with pictures")


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(step, n, batch, seed):
    """The pictures of a step: epochs are fresh shuffles, laid end to end. -> (batch,) int64"""
    at = np.arange(step * batch, (step + 1) * batch)
    order = [epoch_order(n, seed, e)[at[at // n == e] % n] for e in np.unique(at // n)]
    return np.concatenate(order)


class Crops:
    """A folder's pictures as DataLoader wants them; an index is (picture, seed of its crop)."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, index):
        return self.images.crop(*index)


def picture_batches(images, batches, workers):
    """batches: list of lists of (picture, crop seed) -> uint8 tensors (B, H, W, 3), in order.
    Pictures in memory are simply indexed; pictures in files are decoded ahead by workers."""
    if isinstance(images, np.ndarray):
        for batch in batches:
            yield torch.from_numpy(images[[i for i, _ in batch]])
    else:
        yield from DataLoader(Crops(images), batch_sampler=batches, num_workers=workers,
                              collate_fn=lambda crops: torch.from_numpy(np.stack(crops)))


def to_float(images):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]"""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


# -- The training loop, shared by both stages ------------------------------------------------------

def learning_rate(progress, final):
    """Share of the peak: warm-up over the first 2 %, flat to 5 %, then a straight line down."""
    if progress < 0.02:
        return 0.005 + 0.995 * progress / 0.02
    return 1 - (1 - final) * max(0.0, progress - 0.05) / 0.95


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024): every direction of a matrix
    learns equally fast. torch.optim.Muon does the same, but always multiplies in bfloat16, which
    some CPUs only emulate, and one matrix at a time; this one stacks matrices of equal shape."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])          # Nesterov
                by_shape.setdefault(p.shape, []).append((p, update))
            for (rows, columns), pairs in by_shape.items():
                size = group["lr"] * max(1, rows / columns) ** 0.5
                updates = orthogonal(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(size * update)


def orthogonal(g):
    """Nearest matrix with singular values about 1, by five Newton-Schulz steps. (n, r, c)"""
    tall = g.shape[1] > g.shape[2]
    x = (g.mT if tall else g).to(torch.bfloat16 if g.is_cuda else g.dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(g.dtype)


def make_optimizers(model, lr, weight_decay, muon_lr=None):
    """Weights of linear layers and convolutions decay; biases, embeddings, gains and the q/k
    temperature do not. With muon_lr, the matrices inside the blocks go to Muon."""
    decayed = {id(m.weight) for m in model.modules()
               if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    groups = {"muon": [], "decay": [], "plain": []}
    for name, p in model.named_parameters():
        inside = muon_lr and re.search(r"^blocks\..*(attention|mlp)", name) and p.ndim == 2
        groups["muon" if inside else "decay" if id(p) in decayed else "plain"].append(p)
    optimizers = [torch.optim.AdamW(
        [dict(params=groups["decay"], weight_decay=weight_decay),
         dict(params=groups["plain"], weight_decay=0.0)], lr=lr, betas=(0.9, 0.95), fused=True)]
    if groups["muon"]:
        optimizers.append(Muon(groups["muon"], lr=muon_lr, weight_decay=weight_decay))
    return optimizers


def train(run, stage, model, optimizers, extra, total, batches, compute, describe, evaluate):
    """Steps start..total of one stage.

    batches(start) yields what compute(wrapped model, batch) -> (loss (), statistics) needs;
    describe(statistics of the steps since the last line) -> (text, dict) for the log;
    evaluate() looks at held-out pictures, a few times and at the end; `extra` goes into the file."""
    path, settings = run.folder / f"{stage}.pt", run.settings
    start = resume(run, stage, path, model, optimizers, extra)
    if start >= total:
        return run.say(f"{stage}: already trained for {start} steps")
    peaks = [group["lr"] if start == 0 else group["initial_lr"]
             for o in optimizers for group in o.param_groups]
    wrapped, statistics, skipped = run.wrap(model), [], 0
    look_every = max(total // 4, 1)
    begin, images_per_step = time.time(), extra["batch"]
    for step, batch in zip(range(start, total), batches(start)):
        run.seed(stage, step)
        share = learning_rate(step / total, settings.final_lr)
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks):
            group["initial_lr"], group["lr"] = peak, peak * share
        model.train()
        loss, seen = compute(wrapped, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        if torch.isfinite(norm):                           # one bad batch must not spoil the weights
            for optimizer in optimizers:
                optimizer.step()
        else:
            skipped += 1
            if skipped == 10:
                raise BadInput(f"{stage}: the loss was not finite 10 times, last at step {step}; "
                               f"lower the learning rate and go on from {path}")
        model.zero_grad(set_to_none=True)
        statistics.append((loss.detach(), seen))
        step += 1
        if step % settings.log_every == 0 or step == total:
            mean = float(run.mean(torch.stack([s[0] for s in statistics]).mean()))
            text, numbers = describe([s[1] for s in statistics])
            speed = (step - start) / (time.time() - begin)
            lr = optimizers[0].param_groups[0]["lr"]
            run.say(f"{stage} {step}/{total} ({100 * step // total}%) | loss {mean:.4g} | {text} | "
                    f"lr {lr:.1e} | grad {float(norm):.2f} | {speed * images_per_step:.0f} img/s | "
                    f"eta {clock((total - step) / speed)}")
            run.log(dict(stage=stage, step=step, loss=mean, lr=lr, grad=float(norm), **numbers))
            statistics = []
        if step % look_every == 0 or step == total:
            model.eval()
            evaluate(step)
        if step % settings.save_every == 0 or step == total or run.stop:
            save(run, path, model, optimizers, step, extra)
        if run.stop:
            run.say(f"stopped at step {step} of the {stage}, saved; the same command goes on")
            sys.exit(128 + run.stop)


def clock(seconds):
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} m" if seconds < 5400 \
        else f"{seconds / 3600:.1f} h"


def save(run, path, model, optimizers, step, extra):
    if run.rank == 0:
        save_atomically(dict(extra, step=step, model=model.state_dict(),
                             optimizers=[o.state_dict() for o in optimizers]), path)
    run.barrier()


def resume(run, stage, path, model, optimizers, extra):
    """Load the checkpoint if there is one and it belongs to the same settings. -> first step"""
    if run.settings.fresh or not path.exists():
        run.forget_log_after(stage, 0)
        run.barrier()
        return 0
    state = load_checkpoint(path, run.device)
    changed = [f"{key} {state.get('settings', {}).get(key)} -> {value}"
               for key, value in extra["settings"].items()
               if state.get("settings", {}).get(key) != value]
    if changed:
        raise BadInput(f"{path} was trained with other settings ({', '.join(changed)}); "
                       "use --fresh to start over or --out for another folder")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    run.forget_log_after(stage, state["step"])
    run.barrier()
    run.say(f"{stage}: going on at step {state['step']}")
    return state["step"]


# -- Stage 1: the tokenizer ------------------------------------------------------------------------

def psnr(image, other):
    """Peak signal to noise ratio of pictures in [-1, 1], in dB, one per picture. -> (B,)"""
    error = (image.clamp(-1, 1) - other.clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def used(tokens, config):
    """Share of codes used at each scale, over all given tokens: list of lists of (B, n) -> text"""
    V, K = config.vocab_size, len(config.scales)
    share = [len(torch.unique(torch.cat([t[k].flatten() for t in tokens]))) / V for k in range(K)]
    overall = len(torch.unique(torch.cat([t.flatten() for ts in tokens for t in ts]))) / V
    text = " ".join(f"{side}: {part:.0%}" for side, part in zip(config.scales, share))
    return f"used {overall:.0%} ({text})", dict(used=share, used_overall=overall)


def tokenizer_settings(settings, config):
    chosen = ("dataset", "seed", "precision", "flip", "tokenizer_steps", "tokenizer_batch_size",
              "tokenizer_lr", "vq_weight", "final_lr", "clip")
    return {**{k: getattr(settings, k) for k in chosen}, **asdict(config)}


def train_tokenizer(run, config, train_images, test_images, class_names):
    settings = run.settings
    torch.manual_seed(settings.seed)
    model = vqvae.MultiScaleVQVAE(config).to(run.device)
    batch, n = settings.tokenizer_batch_size, len(train_images)
    shown = sample_of(test_images, 500)

    def batches(start):
        plan = [[(int(i), step) for i in batch_indices(step, n, batch, settings.seed)[run.rank::run.world]]
                for step in range(start, settings.tokenizer_steps)]
        return picture_batches(train_images, plan, settings.workers)

    def compute(wrapped, pixels):
        image = to_float(pixels.to(run.device))
        if settings.flip:
            mirrored = torch.rand(len(image), 1, 1, 1, device=run.device) < 0.5
            image = torch.where(mirrored, image.flip(3), image)
        with run.autocast():
            _, tokens, losses = wrapped(image)
        loss = losses["reconstruction"] + settings.vq_weight * (losses["vq"] + losses["extra"])
        return loss, (losses["reconstruction"].detach(), [t.cpu() for t in tokens])

    def describe(statistics):
        error = torch.stack([s[0] for s in statistics]).mean()
        db = float(10 * torch.log10(4 / run.mean(error)))
        text, numbers = used([s[1] for s in statistics], config)
        return f"psnr {db:.1f} dB | {text}", dict(psnr=db, **numbers)

    @torch.no_grad()
    def evaluate(step):
        db, tokens, rows = [], [], []
        for part in shown.split(50):
            image = to_float(part.to(run.device))
            tokens.append(model.image_to_tokens(image))
            rows.append(model.tokens_to_image(tokens[-1]))
            db.append(psnr(rows[-1], image))
        text, numbers = used(tokens, config)
        db = float(torch.cat(db).mean())
        run.say(f"  held out: psnr {db:.2f} dB | {text}")
        run.log(dict(stage="tokenizer", step=step, held_out_psnr=db, held_out=numbers))
        if run.rank == 0:
            grid = torch.cat([to_float(shown[:10]), rows[0][:10].cpu()])
            pictures.save_grid(run.folder / "reconstructions.png", (grid + 1) / 2, columns=10,
                               row_labels=["original", f"{model.K} scales"])

    extra = dict(kind="tokenizer", config=asdict(config), class_names=class_names, batch=batch,
                 settings=tokenizer_settings(settings, config))
    optimizers = make_optimizers(model, settings.tokenizer_lr, 1e-4)
    train(run, "tokenizer", model, optimizers, extra, settings.tokenizer_steps, batches, compute,
          describe, evaluate)
    return model.eval()


def sample_of(images, count):
    """Up to `count` pictures spread evenly over a data set. -> uint8 tensor (n, H, W, 3)"""
    at = np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).astype(int))
    return torch.from_numpy(np.stack([images[int(i)] for i in at]))


def load_tokenizer(path, device="cpu"):
    """-> (frozen MultiScaleVQVAE in eval mode, its checkpoint without the weights)"""
    state = load_checkpoint(path, device)
    state = state.get("tokenizer", state)                  # a shipped file holds both models
    model = build(path, state, vqvae.TokenizerConfig, vqvae.MultiScaleVQVAE)
    return model.to(device), state


def load_transformer(path, device="cpu"):
    """-> (VAR in eval mode, its checkpoint without the weights)"""
    state = load_checkpoint(path, device)
    state = state.get("transformer", state)
    return build(path, state, transformer.VARConfig, transformer.VAR).to(device), state


def build(path, state, config_class, model_class):
    try:
        model = model_class(config_class(**state.pop("config")))
        model.load_state_dict({k: v.float() if v.is_floating_point() else v
                               for k, v in state.pop("model").items()})
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise BadInput(f"{path}: does not hold a {model_class.__name__} "
                       f"({str(error).splitlines()[0][:120]})") from None
    state.pop("optimizers", None)
    return model.eval().requires_grad_(False)


# -- The token cache -------------------------------------------------------------------------------

def fingerprint(model):
    """A short name for exactly these weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def cache_tokens(run, tokenizer, images, split, views):
    """Tokenize every picture once. -> memory-mapped (views, N, L) integers in tokens_<split>.npy.
    View 0 is the picture; for pictures in memory view 1 is its mirror image, for files every view
    is another crop. tokens_<split>.json names data and tokenizer; if it does not fit, start over."""
    path = run.folder / f"tokens_{split}.npy"
    header = dict(dataset=run.settings.dataset, split=split, pictures=len(images), views=views,
                  tokenizer=fingerprint(tokenizer), scales=list(tokenizer.scales))
    note = path.with_suffix(".json")
    if path.exists() and note.exists() and json.loads(note.read_text()) == header:
        return np.load(path, mmap_mode="r")
    L, half = sum(s * s for s in tokenizer.scales), Path(f"{path}.tmp")
    dtype = np.uint16 if tokenizer.config.vocab_size <= 65536 else np.int32
    if run.rank == 0:
        note.unlink(missing_ok=True)
        np.lib.format.open_memmap(half, "w+", dtype, (views, len(images), L)).flush()
    run.barrier()
    cache = np.lib.format.open_memmap(half, "r+")
    mine = np.array_split(np.arange(len(images)), run.world)[run.rank]
    jobs = [(v, list(mine[i:i + 250])) for v in range(views) for i in range(0, len(mine), 250)]
    plan = [[(int(i), v) for i in rows] for v, rows in jobs]
    begin = said = time.time()
    for done, ((view, rows), pixels) in enumerate(
            zip(jobs, picture_batches(images, plan, run.settings.workers)), start=1):
        image = to_float(pixels.to(run.device))
        if view % 2 and isinstance(images, np.ndarray):
            image = image.flip(3)
        cache[view, rows] = torch.cat(tokenizer.image_to_tokens(image), 1).cpu().numpy()
        if time.time() - said > 5:
            said = time.time()
            eta = (said - begin) / done * (len(jobs) - done)
            run.say(f"  tokens of {split}: {100 * done // len(jobs)}% | eta {clock(eta)}")
    cache.flush()
    run.barrier()
    if run.rank == 0:
        os.replace(half, path)
        note.write_text(json.dumps(header))
    run.barrier()
    return np.load(path, mmap_mode="r")


# -- Stage 2: the transformer ----------------------------------------------------------------------

def transformer_settings(settings, config, tokenizer):
    chosen = ("dataset", "seed", "precision", "views", "steps", "batch_size", "optimizer", "lr",
              "muon_lr", "weight_decay", "final_lr", "clip")
    return {**{k: getattr(settings, k) for k in chosen}, **asdict(config),
            "tokenizer": fingerprint(tokenizer)}


def train_transformer(run, tokenizer, config, data, class_names):
    """data: {"train": (tokens (views, N, L), labels), "test": the same}"""
    settings = run.settings
    torch.manual_seed(settings.seed)
    model = transformer.VAR(config).to(run.device)
    run.say(f"transformer: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    sizes = [s * s for s in config.scales]

    def tensors(split, at):
        tokens, labels = data[split]
        views, n, L = tokens.shape
        rows = np.asarray(tokens.reshape(-1, L)[at]).astype(np.int64)
        return (torch.from_numpy(rows).to(run.device),
                torch.from_numpy(np.asarray(labels)[at % n]).to(run.device))

    def batches(start):
        n = data["train"][0].shape[0] * data["train"][0].shape[1]
        for step in range(start, settings.steps):
            at = batch_indices(step, n, settings.batch_size, settings.seed + 1)
            yield tensors("train", at[run.rank::run.world])

    def per_token_loss(predict, tokens, labels):
        """-> (cross-entropy in nats (B, L), right (B, L) bool)"""
        with torch.no_grad():
            inputs = tokenizer.teacher_inputs(list(tokens.split(sizes, 1)))
        with run.autocast():
            logits = predict(labels, inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none")
        return loss.view_as(tokens), logits.argmax(-1) == tokens

    def compute(wrapped, batch):
        loss, right = per_token_loss(wrapped, *batch)
        return loss.mean(), (per_scale(loss.detach()), right.float().mean())

    def per_scale(loss):
        return torch.stack([part.mean() for part in loss.split(sizes, 1)])

    def describe(statistics):
        scales = run.mean(torch.stack([s[0] for s in statistics]).mean(0)).tolist()
        right = float(run.mean(torch.stack([s[1] for s in statistics]).mean()))
        text = f"per-scale {' '.join(f'{x:.2f}' for x in scales)} | right {right:.1%}"
        return text, dict(per_scale=scales, right=right)

    @torch.no_grad()
    def evaluate(step):
        _, n, _ = data["test"][0].shape
        found = [per_token_loss(model, *tensors("test", np.arange(i, min(i + 100, n))))
                 for i in range(0, min(n, 2000), 100)]
        loss = torch.cat([f[0] for f in found])
        right = float(torch.cat([f[1] for f in found]).float().mean())
        scales = per_scale(loss).tolist()
        run.say(f"  held out: loss {float(loss.mean()):.3f} | per-scale "
                f"{' '.join(f'{x:.2f}' for x in scales)} | right {right:.1%}")
        run.log(dict(stage="transformer", step=step, held_out_loss=float(loss.mean()),
                     held_out_per_scale=scales, held_out_right=right))

    extra = dict(kind="transformer", config=asdict(config), class_names=class_names,
                 batch=settings.batch_size, dataset=settings.dataset,
                 sampling=dict(cfg=settings.cfg, top_k=settings.top_k, top_p=settings.top_p),
                 settings=transformer_settings(settings, config, tokenizer))
    optimizers = make_optimizers(model, settings.lr, settings.weight_decay,
                                 settings.muon_lr if settings.optimizer == "muon" else None)
    train(run, "transformer", model, optimizers, extra, settings.steps, batches, compute, describe,
          evaluate)


# -- The whole road --------------------------------------------------------------------------------

def relaunch(settings):
    """Start one process per GPU (with --device cpu: per gloo process) and wait for them."""
    if pick_device(settings.device).type == "cuda" and settings.gpus > torch.cuda.device_count():
        raise BadInput(f"--gpus {settings.gpus}: this machine has {torch.cuda.device_count()}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={settings.gpus}", os.path.abspath(__file__), *sys.argv[1:]]
    return subprocess.call(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def train_all(settings, config, var_fields):
    run = Run(settings)
    run.say(json.dumps({**asdict(settings), **asdict(config), **var_fields}))
    if run.rank == 0:
        load_data(settings, "train", config.image_size)    # downloads once, not once per process
    run.barrier()
    data = {split: load_data(settings, split, config.image_size) for split in ("train", "test")}
    (train_images, labels, class_names), (test_images, test_labels, _) = data.values()
    run.say(f"{settings.dataset}: {len(train_images)} pictures to train on, {len(test_images)} held "
            f"out, {len(class_names)} classes, {config.image_size} px, on {run.device} in "
            f"{settings.precision} with {run.world} process(es)")
    if settings.stage != "transformer":
        tokenizer = train_tokenizer(run, config, train_images, test_images, class_names)
    if settings.stage == "tokenizer":
        return
    tokenizer, _ = load_tokenizer(run.folder / "tokenizer.pt", run.device)
    tokens = {"train": (cache_tokens(run, tokenizer, train_images, "train", settings.views), labels),
              "test": (cache_tokens(run, tokenizer, test_images, "test", 1), test_labels)}
    known = tokenizer.config
    var_config = transformer.VARConfig(**{
        **var_fields, "num_classes": len(class_names), "scales": known.scales,
        "vocab_size": known.vocab_size, "latent_dim": known.latent_dim})
    train_transformer(run, tokenizer, var_config, tokens, class_names)
    run.barrier()
    if run.rank == 0 and settings.steps:                   # chapter 6, as you would call it
        script = Path(__file__).with_name("06_sample_and_edit.py")
        subprocess.call([sys.executable, str(script), "--run", str(run.folder), "--out",
                         str(run.folder), "--device", run.device.type])


def one_line(main):
    """Run a script's main(); a user's mistake ends in one line and exit status 2."""
    try:
        status = main()
    except (BadInput, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        status = 2
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


def main():
    settings, config, var_fields = read_settings()
    if settings.gpus > 1 and "RANK" not in os.environ:
        load_data(settings, "test", config.image_size)     # mistakes show up before N processes start
        return relaunch(settings)
    return train_all(settings, config, var_fields)


if __name__ == "__main__":
    one_line(main)
