"""Chapter 5: train. Images -> tokenizer -> cached tokens -> transformer.

    images --(stage 1)--> tokenizer --(once)--> tokens --(stage 2)--> transformer
              out/NAME/tokenizer.pt      tokens_train_*.npy           transformer.pt

    stage 1   L2 + 0.25 vq + extra (chapter 2) + lambda_P LPIPS + lambda_G w adversarial
              (the last two, and w, which balances gradients: engine/perceptual.py; the
              shapes use neither)
    stage 2   cross-entropy of each token given all coarser maps, all tokens weighted alike

    python 05_train.py                               built-in shapes on a CPU, minutes
    python 05_train.py --dataset cifar10             one GPU; finds or downloads CIFAR-10
    python 05_train.py --dataset imagenet --gpus 8   data/imagenet/, or give --data-dir
    python 05_train.py --dataset /path/to/folder     class folders of your own images

The same command resumes, --fresh starts over, --help lists all settings. Read first
`train_tokenizer`, `encode_once`, `token_losses` and `train_transformer`; the rest serves them.

Shapes: image (B, 3, H, W) in [-1, 1]; tokens (B, L) int64; logits (B, L, V).
Sources: VAR (Tian et al. 2024), section 4, and its released code for the ImageNet recipe;
VQGAN (Esser et al. 2021) for stage 1; Muon (Jordan et al. 2024) for small models.
"""
import hashlib
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path

# Threads that spin while they wait make steps forty times slower on a busy machine. To spin
# less costs a few per cent; torch reads this when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.nn.functional as F

from data.batches import (image_fingerprint, per_pass, picture_batches, rows_of, sample_of,
                          to_float, view_batches)
from data.registry import load_splits
from engine import BadInput, checkpoints, distributed, perceptual, released
from engine.device import autocast
from engine.optimizers import make_optimizers, set_schedule, take_step
from engine.options import option, read_options, run_main
from engine.progress import clock, progress
from report import health

vqvae = import_module("02_multiscale_vqvae")
transformer = import_module("04_var_transformer")


# -- Settings ------------------------------------------------------------------------------

@dataclass
class Settings:
    """Every setting is a command-line option. The defaults train on the built-in shapes."""
    # The run: these may differ when it is resumed.
    out: str = option("", "folder of this run; default: out/<preset or data set>")
    preset: str = option("", "settings to start from; default: those of the data set")
    stage: str = option("all", "train the tokenizer (stage 1), the transformer (2) or both",
                        choices=("all", "tokenizer", "transformer"))
    tokenizer_file: str = option("", "tokenizer for stage 2, trained here or released")
    data_dir: str = option("", "folder of the data, if not the usual one")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    gpus: int = option(1, "number of processes on this machine, one per GPU")
    compile: bool = option(False, "use torch.compile in stage 2; pays off in long runs")
    workers: int = option(-1, "processes per GPU that decode files; -1: auto", low=-1)
    accumulate: int = option(1, "parts of a batch, to save memory")
    activation_checkpointing: bool = option(False, "save memory in stage 2, for time")
    save_every: int = option(500, "steps between checkpoints")
    log_every: int = option(50, "steps between log lines")
    fresh: bool = option(False, "train again what --stage names instead of resuming")
    export: str = option("", "also write both models, in half precision, to this file")
    cfg: float = option(0.5, "default guidance when sampling from this run")
    top_k: int = option(0, "default top-k when sampling (0: off)", low=0)
    top_p: float = option(0.0, "default top-p when sampling (0: off)")
    # Both stages.
    dataset: str = option("shapes", "shapes, cifar10, imagenet, or the path of a folder")
    seed: int = option(0, "the same seed gives the same run", low=0)
    precision: str = option("auto", "auto: the fastest, but float16 on GPUs only",
                            choices=("auto", "float32", "bfloat16", "float16"))
    optimizer: str = option("muon", "for matrices inside the blocks; adamw for the rest",
                            choices=("muon", "adamw"))
    clip: float = option(2.0, "largest norm of the gradient")
    image_size: int = option(32, "side of the square images, in pixels")
    scales: tuple = option((1, 2, 3, 4, 6, 8), "sides of the token maps")
    vocab_size: int = option(512, "V, number of codes")
    latent_dim: int = option(32, "C, length of a code")
    # Stage 1: the tokenizer.
    tokenizer_steps: int = option(1200, "steps of stage 1")
    tokenizer_batch_size: int = option(16, "images per step of stage 1, over all GPUs")
    tokenizer_lr: float = option(3e-3, "peak learning rate of AdamW in stage 1 (Muon: 0.02)")
    flip: bool = option(False, "mirror half of the images in stage 1")
    perceptual: float = option(0.0, "weight of the perceptual loss (LPIPS); 0: off")
    adversarial: float = option(0.0, "weight of the adversarial loss (PatchGAN); 0: off")
    channels: int = option(64, "width of the tokenizer's first convolution")
    multipliers: tuple = option((1,), "width at each resolution over --channels")
    blocks: int = option(1, "residual blocks at each resolution")
    unshuffle: int = option(4, "fold this many pixels a side into channels first")
    groups: int = option(8, "groups of the group normalisation")
    attention: bool = option(False, "attention at the tokenizer's lowest resolution")
    quantizer: str = option("vq", "how features become codes",
                            choices=tuple(vqvae.vq.QUANTIZERS))
    learn: str = option("ema", "how codes learn", choices=("ema", "gradient"))
    # Stage 2: the transformer.
    classes: tuple = option((), "train on these classes (names, wnids), or the first N",
                            nargs="+", metavar="NAME")
    views: int = option(1, "versions of each image (mirrored, shifted) in the token cache")
    steps: int = option(1000, "steps of stage 2", low=0)
    epochs: int = option(0, "passes over the images in stage 2; 0: use --steps", low=0)
    batch_size: int = option(16, "images per step of stage 2, over all GPUs")
    lr: float = option(1.5e-3, "peak learning rate of AdamW in stage 2 (Muon: 0.02)")
    final_lr: float = option(0.0, "share of the peak learning rate that is left at the end")
    weight_decay: float = option(0.05, "weight decay of matrices in stage 2")
    final_weight_decay: float = option(0.05, "its value at the end of the run")
    depth: int = option(4, "number of transformer blocks")
    width: int = option(128, "D, width of the transformer")
    heads: int = option(4, "attention heads")
    shared_adaln: bool = option(False, "one AdaLN layer for all blocks")
    drop_path: float = option(0.0, "drop-path rate of the last block")
    label_dropout: float = option(0.1, "share of labels hidden in training, for guidance")


NAMES = [field.name for field in fields(Settings)]
OF_THE_RUN = NAMES[:NAMES.index("dataset")]
OF_STAGE_1 = NAMES[NAMES.index("tokenizer_steps"):NAMES.index("classes")]
OF_STAGE_2 = NAMES[NAMES.index("classes"):]

# What a data set, or --preset, changes in the defaults. The data set "folder" is any path.
PRESETS = {
    "shapes": dict(tokenizer_lr=5e-3, lr=4.5e-3),           # the best for so short a run
    "cifar10": dict(
        dataset="cifar10", vocab_size=1024, channels=96, flip=True, adversarial=0.2,
        tokenizer_steps=25_000, tokenizer_batch_size=128, views=16, steps=30_000,
        batch_size=256, depth=6, width=256, shared_adaln=True, drop_path=0.1, cfg=2.0,
        top_p=0.9),
    "cifar10-cpu": dict(
        dataset="cifar10", classes=("automobile", "horse", "ship"), flip=True,
        adversarial=0.2, tokenizer_steps=12_000, views=4, steps=14_000, batch_size=24,
        depth=6, width=192, heads=3, shared_adaln=True, drop_path=0.05, cfg=3.0, top_p=0.8),
    "folder": dict(
        image_size=64, vocab_size=1024, tokenizer_steps=20_000, tokenizer_batch_size=32,
        views=4, steps=30_000, batch_size=64, depth=8, width=384, heads=6, drop_path=0.03,
        cfg=1.5),
    "imagenet": dict(
        released.TOKENIZER, dataset="imagenet", learn="ema", views=8, perceptual=1.0,
        adversarial=0.5, tokenizer_steps=250_000, tokenizer_batch_size=256,
        tokenizer_lr=1e-4, optimizer="adamw", depth=16, epochs=200, batch_size=768, lr=1e-4,
        final_lr=0.1, cfg=1.5, top_k=900, top_p=0.96, save_every=1000),
}
# How the original code trains on ImageNet: what changes from this depth on. Here and in the
# preset, lr is for a batch of 256 images.
RECIPES = {
    20: dict(epochs=250),
    24: dict(epochs=350, lr=8e-5, final_lr=0.01),
    30: dict(batch_size=1024, final_weight_decay=0.08),
    36: dict(batch_size=768, image_size=512, shared_adaln=True),
}
# Side of the last token map -> sides of all maps. Those of 16 and 32 are the paper's.
SCALES = {4: (1, 2, 3, 4), 8: (1, 2, 3, 4, 6, 8), 16: released.SCALES[680],
          32: released.SCALES[2240]}
# Image size -> multipliers of our small tokenizers, which halve the side between them.
MULTIPLIERS = {64: (1, 2), 128: (1, 2), 256: (1, 2, 2), 512: (1, 2, 2)}


def read_settings(argv=None):
    """Command line -> Settings. A typed option wins over the preset, the preset over the
    defaults. Raises BadInput for settings that do not fit together."""
    typed = read_options(argv, __doc__.splitlines()[0], Settings)
    name = typed.get("preset") or typed.get("dataset", "shapes")
    if "preset" in typed and name not in PRESETS:
        raise BadInput(f"--preset {name}: use one of {', '.join(PRESETS)}")
    preset = PRESETS.get(name, PRESETS["folder"])
    if typed.get("tokenizer_file"):
        preset = preset | released.TOKENIZER | dict(stage="transformer")
    if name == "imagenet":
        depth = typed.get("depth", preset["depth"])
        preset = preset | dict(width=64 * depth, heads=depth, drop_path=0.1 * depth / 24)
        for smallest, changes in RECIPES.items():
            if depth >= smallest:
                preset = preset | changes
        preset["lr"] = preset["lr"] * typed.get("batch_size", preset["batch_size"]) / 256
    if "steps" in typed:
        preset = preset | dict(epochs=0)
    settings = Settings(**(preset | typed))
    settings.out = settings.out or os.path.join("out", Path(name).resolve().name)
    if "multipliers" not in preset | typed:
        settings.multipliers = MULTIPLIERS.get(settings.image_size, settings.multipliers)
    if "scales" not in typed:
        halvings = len(settings.multipliers) - 1
        side = settings.image_size // settings.unshuffle // 2 ** halvings
        settings.scales = SCALES.get(side, settings.scales)

    if settings.perceptual and settings.image_size < 16:
        raise BadInput("--perceptual needs images of at least 16 pixels")
    if settings.tokenizer_file and settings.stage != "transformer":
        raise BadInput(f"--tokenizer-file is for stage 2, not for --stage {settings.stage}")
    parts = max(settings.gpus, int(os.environ.get("WORLD_SIZE", 1))) * settings.accumulate
    if settings.tokenizer_batch_size % parts or settings.batch_size % parts:
        raise BadInput("--tokenizer-batch-size and --batch-size must be multiples of "
                       f"{parts}, the number of processes times --accumulate")
    try:
        config_of(vqvae.TokenizerConfig, settings)
        config_of(transformer.VARConfig, settings, num_classes=1)
    except ValueError as error:
        raise BadInput(str(error)) from None
    return settings


def config_of(config_class, *sources, **others):
    """A TokenizerConfig or VARConfig. Each field is taken from `others`, or else from the
    first source (settings or another config) that has it."""
    for source in sources:
        for field in fields(config_class):
            if hasattr(source, field.name):
                others.setdefault(field.name, getattr(source, field.name))
    return config_class(**others)


# -- Schedule, order and randomness --------------------------------------------------------

def learning_rate(progress, final):
    """Share of the peak learning rate: a warm-up over the first 2 % of the run, flat up to
    5 %, then a straight line down to `final`."""
    if progress < 0.02:
        return 0.005 + 0.995 * progress / 0.02
    return 1 - (1 - final) * max(0.0, progress - 0.05) / 0.95


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(step, n, batch, seed):
    """Which of n images a step (counted from 0) sees: every epoch is a new shuffle, and
    epochs are laid end to end. This depends on step and seed alone, so a run can resume at
    any step and on any number of GPUs. -> (batch,) int64"""
    # Exercise 05_2
    places = np.arange(step * batch, (step + 1) * batch)
    epochs = places // n
    parts = [epoch_order(n, seed, epoch)[places[epochs == epoch] % n]
             for epoch in np.unique(epochs)]
    return np.concatenate(parts)


def crops_to_load(start, n, settings):
    """This process's part of each batch of stage 1, from step `start` on: a list of (index
    of an image, seed of its random crop)."""
    for step in range(start, settings.tokenizer_steps):
        indices = batch_indices(step, n, settings.tokenizer_batch_size, settings.seed)
        yield [(int(i), settings.seed * 10 ** 9 + step) for i in distributed.share(indices)]


def seed_step(settings, stage, step):
    """Derive all random numbers of a step from (seed, stage, step, process). A run thus
    resumes bit for bit, although no random state is saved. stage: 1 or 2"""
    words = [settings.seed, stage - 1, step, distributed.rank()]
    torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))


# -- What the two loops share --------------------------------------------------------------

def facts_of(settings, model, class_names, of_other_stage):
    """What a checkpoint holds besides weights. A resumed run has the same "settings"."""
    free = OF_THE_RUN + of_other_stage
    same = {name: getattr(settings, name) for name in NAMES if name not in free}
    same |= asdict(model.config)
    return dict(class_names=class_names, dataset=settings.dataset,
                config=asdict(model.config), settings=same)


def report(path, step, steps, batch_size, seconds, text, numbers):
    """Log what a step has in both stages, and `text`. seconds: of one step"""
    eta = clock((steps - step) * seconds)
    line = (f"{path.stem} {step}/{steps} ({100 * step // steps}%) | {text} | "
            f"lr {numbers['lr']:.1e} | grad {numbers['grad']:.2f} | "
            f"{batch_size / seconds:.0f} img/s | eta {eta}")
    checkpoints.log(path, step, line, **numbers)


def save_or_stop(settings, path, facts, modules, optimizers, step, steps):
    """Save the stage when it is due. If a signal asked this run to stop, save and exit."""
    stopping = distributed.stop_requested(step)
    if step % settings.save_every == 0 or step == steps or stopping:
        checkpoints.save(path, facts, modules, optimizers, step)
    distributed.leave_if(stopping, f"and saved at step {step} of the {path.stem}")


# -- Stage 1: the tokenizer ----------------------------------------------------------------

def train_tokenizer(settings, tokenizer, splits, class_names, device):
    """Train a MultiScaleVQVAE from its last checkpoint to settings.tokenizer_steps. splits:
    {"train", "test": (images, labels)}, images uint8 (N, H, W, 3), in memory or read on
    demand. Raises BadInput if the checkpoint is of another run."""
    path, steps = Path(settings.out) / "tokenizer.pt", settings.tokenizer_steps
    # Stage 1 has no loss scale, without which gradients vanish in float16.
    precision = "float32" if settings.precision == "float16" else settings.precision
    compute = partial(autocast, device, precision)
    facts = facts_of(settings, tokenizer, class_names, OF_STAGE_2)
    modules = {"model": tokenizer.to(device)}
    optimizers = make_optimizers(tokenizer, settings.tokenizer_lr, 1e-4, settings.optimizer,
                                 precision)
    if settings.perceptual:
        lpips = perceptual.load_perceptual().to(device)
    if settings.adversarial:
        critic = perceptual.Discriminator(settings.image_size).to(device)
        modules["critic"] = critic
        optimizers.append(torch.optim.AdamW(
            critic.parameters(), min(settings.tokenizer_lr, 3e-4), (0.5, 0.9), fused=True))
    start = checkpoints.resume(path, facts, settings, modules, optimizers)
    model = distributed.data_parallel(tokenizer)

    images, held_out = splits["train"][0], sample_of(splits["test"][0], 1000)
    crops = crops_to_load(start, len(images), settings)
    batches = picture_batches(images, crops, settings.workers)
    began, skipped, losses, db, counts = time.monotonic(), 0, [], [], 0
    for step, batch in enumerate(batches, start + 1):
        done = (step - 1) / steps
        seed_step(settings, 1, step - 1)
        set_schedule(optimizers, done, learning_rate(done, final=0.0))
        tokenizer.train()
        image = to_float(batch.to(device))                             # (B, 3, H, W)
        if settings.flip:
            mirrored = torch.rand(len(image), 1, 1, 1, device=device) < 0.5
            image = torch.where(mirrored, image.flip(3), image)

        share = settings.adversarial * perceptual.start_late(done)
        for part in image.chunk(settings.accumulate):
            adversarial, critic_loss = 0.0, 0.0
            with compute():
                decoded, tokens, terms = model(part)         # here the codes learn, too
                image_loss = terms["reconstruction"]
                if settings.perceptual:
                    distance = lpips(decoded, part).mean()
                    image_loss = image_loss + settings.perceptual * distance
                if share:
                    last = tokenizer.decoder.conv_out.weight
                    adversarial, critic_loss = perceptual.adversarial_losses(
                        critic, part, decoded, image_loss, last)
            loss = image_loss + 0.25 * terms["vq"] + terms["extra"] + share * adversarial
            ((loss + critic_loss) / settings.accumulate).backward()
            losses.append(loss.detach())
            db.append(health.psnr(decoded.detach(), part).mean())
            counts = counts + health.count_codes(tokens, tokenizer.config.vocab_size)
        norm = torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), settings.clip)
        critic_norm = 0.0
        if settings.adversarial:
            distributed.average_gradients(critic)            # DDP does it for the tokenizer
            critic_norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), settings.clip)
        skipped = take_step(optimizers, norm + critic_norm, skipped)

        if step % settings.log_every == 0 or step == steps:
            numbers = dict(loss=float(distributed.mean(torch.stack(losses).mean())),
                           psnr=float(distributed.mean(torch.stack(db).mean())),
                           grad=float(norm), lr=optimizers[0].param_groups[0]["lr"],
                           **health.usage(distributed.total(counts)))
            seconds = (time.monotonic() - began) / (step - start)
            text = (f"loss {numbers['loss']:.4g} | psnr {numbers['psnr']:.1f} dB | "
                    f"{health.short(tokenizer.scales, numbers)}")
            report(path, step, steps, settings.tokenizer_batch_size, seconds, text, numbers)
            losses, db, counts = [], [], 0
        if 4 * step % steps < 4 and distributed.rank() == 0:  # after each quarter
            text, numbers = health.check_up(tokenizer.eval(), held_out, device, compute,
                                            path.with_name("reconstructions.png"))
            checkpoints.log(path, step, f"  held out at step {step}: {text}", held_out=numbers)
        save_or_stop(settings, path, facts, modules, optimizers, step, steps)
    tokenizer.eval().requires_grad_(False)


# -- The token cache: every image is encoded only once -------------------------------------

@torch.no_grad()
def encode_once(settings, tokenizer, images, split, device):
    """Encode all images of a split with the frozen tokenizer. -> an array (N, L) for each
    view, memory-mapped from files. The name of a file holds a hash of images and tokenizer,
    so a complete file is used again, but never for others."""
    facts = f"{image_fingerprint(images)} {checkpoints.model_fingerprint(tokenizer)}"
    key = hashlib.sha256(facts.encode()).hexdigest()[:12]
    count = settings.views if split == "train" else 1
    folder = Path(settings.out)
    paths = [folder / f"tokens_{split}_{key}_{view}.npy" for view in range(count)]
    shape = (len(images), sum(side * side for side in tokenizer.scales))
    dtype = np.uint16 if tokenizer.config.vocab_size <= 2 ** 16 else np.int32
    mine = np.array_split(np.arange(len(images)), distributed.world())[distributed.rank()]
    at_once = per_pass(tokenizer.config.image_size)
    rows = [mine[begin:begin + at_once] for begin in range(0, len(mine), at_once)]
    for view, path in enumerate(paths):
        if distributed.agreed(path.exists()):
            continue
        unfinished = path.with_suffix(".tmp")
        if distributed.rank() == 0:
            with open(unfinished, "wb") as file:             # a full disk is noticed here
                np.save(file, np.zeros(shape, dtype))
        distributed.barrier()
        cache = np.load(unfinished, mmap_mode="r+")
        batches = view_batches(images, view, rows, settings.workers)
        text = f"tokenized for {split}, view {view + 1} of {count}"
        for part, image in zip(progress(rows, len(mine), text), batches):
            with autocast(device, settings.precision):
                tokens = tokenizer.image_to_tokens(image.to(device))   # K maps (B, n)
            cache[part] = torch.cat(tokens, 1).cpu().numpy()           # (B, L)
            distributed.leave_if(distributed.stop_requested(), "while tokenizing")
        cache.flush()
        distributed.barrier()
        if distributed.rank() == 0:
            os.replace(unfinished, path)
        distributed.barrier()
    return [np.load(path, mmap_mode="r") for path in paths]


def cached_rows(views, labels, indices, device):
    """All views together are one longer data set. indices (B,) into it -> tokens (B, L),
    labels (B,)"""
    n = len(labels)
    tokens = np.stack([views[i // n][i % n] for i in indices]).astype(np.int64)
    labels = labels[indices % n]
    return torch.from_numpy(tokens).to(device), torch.from_numpy(labels).to(device)


# -- Stage 2: the transformer --------------------------------------------------------------

def token_losses(model, tokenizer, tokens, labels):
    """Teacher forcing: the inputs are made from the real coarser maps. Output i predicts
    token i, of its own map; unlike in a language model, nothing is shifted by one.
    tokens (B, L), labels (B,) -> cross-entropy in nats (B, L), right (B, L) bool"""
    # Exercise 05_1
    sizes = [side * side for side in tokenizer.scales]
    with torch.no_grad():
        inputs = tokenizer.teacher_inputs(list(tokens.split(sizes, 1)))  # (B, L - first, C)
    logits = model(labels, inputs)                                       # (B, L, V)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none")
    return loss.view_as(tokens), logits.argmax(-1) == tokens


def train_transformer(settings, var, tokenizer, cached_tokens, class_names, device):
    """Train a VAR from its last checkpoint to settings.steps. cached_tokens() returns two
    pairs (list of views (N, L), labels (N,)), to train on and held out. Raises BadInput if
    the checkpoint is of another run."""
    path, steps = Path(settings.out) / "transformer.pt", settings.steps
    compute = partial(autocast, device, settings.precision)
    facts = facts_of(settings, var, class_names, OF_STAGE_1)
    facts["settings"]["tokenizer"] = checkpoints.model_fingerprint(tokenizer)
    facts["sampling"] = dict(cfg=settings.cfg, top_k=settings.top_k, top_p=settings.top_p)
    # In float16 gradients below 6e-8 vanish, so the loss is multiplied before backward().
    half = settings.precision == "float16"
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** 11, enabled=half)
    modules = {"model": var.to(device), "scaler": scaler}
    optimizers = make_optimizers(var, settings.lr, settings.weight_decay,
                                 settings.optimizer, settings.precision)
    start = checkpoints.resume(path, facts, settings, modules, optimizers)
    var.activation_checkpointing = settings.activation_checkpointing
    model = distributed.data_parallel(var, settings.compile)

    train, test = cached_tokens()         # only now, so that a refused command costs nothing
    images = len(train[0]) * len(train[1])                   # in all views
    began, skipped, losses, hits = time.monotonic(), 0, [], []
    for step in range(start + 1, steps + 1):
        done = (step - 1) / steps
        seed_step(settings, 2, step - 1)
        set_schedule(optimizers, done, learning_rate(done, settings.final_lr),
                     settings.final_weight_decay)
        var.train()
        indices = batch_indices(step - 1, images, settings.batch_size, settings.seed + 1)
        tokens, labels = cached_rows(*train, distributed.share(indices), device)

        for part in range(settings.accumulate):
            rows = slice(part, None, settings.accumulate)    # every n-th image of the batch
            with compute():
                loss, right = token_losses(model, tokenizer, tokens[rows], labels[rows])
            scaler.scale(loss.mean() / settings.accumulate).backward()
            losses.append(loss.detach().mean(0))             # (L,)
            hits.append(right.float().mean())
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(var.parameters(), settings.clip)
        skipped = take_step(optimizers, norm, skipped, scaler)

        if step % settings.log_every == 0 or step == steps:
            loss = distributed.mean(torch.stack(losses).mean(0))       # (L,)
            right = distributed.mean(torch.stack(hits).mean())
            text, numbers = describe(loss, right, tokenizer.scales)
            numbers.update(grad=float(norm), lr=optimizers[0].param_groups[0]["lr"])
            seconds = (time.monotonic() - began) / (step - start)
            report(path, step, steps, settings.batch_size, seconds, text, numbers)
            losses, hits = [], []
        if 4 * step % steps < 4 and distributed.rank() == 0:  # after each quarter
            text, numbers = evaluate(var.eval(), tokenizer, test, device, compute)
            checkpoints.log(path, step, f"  held out at step {step}: {text}", held_out=numbers)
        save_or_stop(settings, path, facts, modules, optimizers, step, steps)
    var.eval().requires_grad_(False)


def describe(loss, right, scales):
    """loss (L,) in nats, right () in [0, 1] -> text and numbers for the log"""
    sizes = [side * side for side in scales]
    per_scale = [float(part.mean()) for part in loss.split(sizes)]
    each = " ".join(f"{x:.2f}" for x in per_scale)
    text = f"loss {loss.mean():.4g} | per-scale {each} | right {right:.1%}"
    return text, dict(loss=float(loss.mean()), per_scale=per_scale, right=float(right))


@torch.no_grad()
def evaluate(var, tokenizer, test, device, compute):
    """The loss on up to 1,000 held-out images. -> as describe()"""
    chosen = rows_of(len(test[1]), 1000)
    with compute():
        found = [token_losses(var, tokenizer, *cached_rows(*test, rows, device))
                 for rows in np.split(chosen, range(100, len(chosen), 100))]
    losses, hits = map(torch.cat, zip(*found))
    return describe(losses.mean(0), hits.float().mean(), tokenizer.scales)


# -- Models from files ---------------------------------------------------------------------

def load_tokenizer(path):
    """-> (frozen MultiScaleVQVAE in eval mode, the rest of its file). Raises BadInput"""
    return checkpoints.load_model(path, "tokenizer", vqvae.MultiScaleVQVAE,
                                  vqvae.TokenizerConfig)


def load_transformer(path):
    """-> (frozen VAR in eval mode, the rest of its file). Raises BadInput"""
    return checkpoints.load_model(path, "transformer", transformer.VAR,
                                  transformer.VARConfig)


def tokenizer_for_stage_2(settings):
    """The run's own tokenizer or that of --tokenizer-file, trained here or released. Its
    sizes become those of the settings. Raises BadInput"""
    own = Path(settings.out) / "tokenizer.pt"
    given = Path(settings.tokenizer_file or own)
    if not given.exists():
        raise BadInput(f"there is no {given}: first train one with --stage tokenizer")
    state = checkpoints.load_checkpoint(given)
    if "config" in state or "tokenizer" in state:
        tokenizer, about = load_tokenizer(given)
        steps = about.get("settings", {}).get("tokenizer_steps", 0)
        if not settings.tokenizer_file and about["step"] < steps:
            raise BadInput(f"{own} was trained for {about['step']} of {steps} steps: "
                           "finish it with --stage tokenizer")
    else:
        sizes, weights = released.read_tokenizer(state, settings.scales)
        tokenizer = vqvae.MultiScaleVQVAE(vqvae.TokenizerConfig(**sizes))
        released.fill(tokenizer, weights)
    fingerprint = checkpoints.model_fingerprint
    if own.exists() and fingerprint(load_tokenizer(own)[0]) != fingerprint(tokenizer):
        raise BadInput(f"{own} differs from {given}: choose a new folder with --out")
    for name in ("image_size", "scales", "vocab_size", "latent_dim"):
        setattr(settings, name, getattr(tokenizer.config, name))
    return tokenizer


# -- End to end ----------------------------------------------------------------------------

def train_both(settings):
    """Stages 1 and 2, or the one of --stage. -> the lock of the run's folder"""
    device = distributed.start(settings.device)
    if settings.stage == "transformer":
        tokenizer = tokenizer_for_stage_2(settings)
    splits, chosen, class_names = load_splits(settings.dataset, settings.image_size,
                                              settings.data_dir, settings.classes)
    if settings.gpus > 1 and "RANK" not in os.environ:
        # So far one process has loaded the data and reported mistakes, not all of them.
        if settings.perceptual and settings.stage != "transformer":
            perceptual.load_perceptual()
        distributed.launch(settings.gpus, settings.device)
    n = len(chosen["train"][1])
    settings.classes = tuple(class_names) if settings.classes else ()
    if settings.epochs:
        settings.steps = max(1, settings.epochs * n // settings.batch_size)
    lock = checkpoints.open_run(settings, device)
    distributed.listen_for_signals()
    distributed.say(f"{n:,} images to train on, {len(chosen['test'][1]):,} held out, "
                    f"{len(class_names)} classes; {distributed.world()} process(es) on "
                    f"{device.type} in {settings.precision}")

    own = Path(settings.out) / "tokenizer.pt"
    torch.manual_seed(settings.seed)
    if settings.stage != "transformer":
        tokenizer = vqvae.MultiScaleVQVAE(config_of(vqvae.TokenizerConfig, settings))
        train_tokenizer(settings, tokenizer, splits, class_names, device)
    elif not distributed.agreed(own.exists()):             # given by --tokenizer-file
        facts = dict(config=asdict(tokenizer.config), settings={})
        checkpoints.save(own, facts, {"model": tokenizer}, [], step=0)
    if settings.stage != "tokenizer":
        tokenizer.to(device)
        torch.manual_seed(settings.seed)
        var = transformer.VAR(config_of(transformer.VARConfig, tokenizer.config, settings,
                                        num_classes=len(class_names)))

        def cached_tokens():
            return [(encode_once(settings, tokenizer, images, split, device), labels)
                    for split, (images, labels) in chosen.items()]
        train_transformer(settings, var, tokenizer, cached_tokens, class_names, device)
    return lock


def main():
    settings = read_settings()
    lock = train_both(settings)                            # held until the images are drawn
    rank = distributed.rank()
    distributed.finish()
    if rank > 0 or settings.stage == "tokenizer" or not settings.steps:
        return 0
    if settings.export:
        checkpoints.export(settings.out, settings.export)
    script = str(Path(__file__).with_name("06_sample_and_edit.py"))
    print(f"more images: python {Path(script).name} --run {settings.out}", flush=True)
    return subprocess.call([sys.executable, script, "--run", settings.out, "--device",
                            settings.device, "--task", "sample", "--out", settings.out])


if __name__ == "__main__":
    run_main(main)
