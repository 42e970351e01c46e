"""Settings of a run: where it computes, and what each stage depends on.

Fields made with `option` are options of the command line; presets, experiments and --set reach the
others. The settings class of a stage is that stage's identity: a run whose fields differ from those
in its checkpoint is another run. What may differ stands in RunSettings.
"""
import os
import textwrap
from dataclasses import dataclass, field, fields
from pathlib import Path

from engine import BadInput
from engine.devices import loading_workers
from engine.optimizers import OPTIMIZERS
from engine.options import option


@dataclass
class RunSettings:
    """Where a run computes, what it shows and keeps. A run may be resumed with other values."""
    out: str = option("", "folder of this run; default out/<dataset> or out/<preset>")
    preset: str = option("", "which of PRESETS to start from; default: that of the data set")
    stage: str = option("all", "tokenizer (1), transformer (2, on the tokenizer of --out), or all",
                        choices=("all", "tokenizer", "transformer"))
    tokenizer_file: str = option("", "stage 2 on this tokenizer, such as vae_ch160v4096z32.pth")
    data_dir: str = option("", "folder of the data, if not the usual one")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    gpus: int = option(1, "processes on this machine, one per GPU")
    compile: bool = option(False, "torch.compile both models (pays off in long runs)")
    workers: int | None = option(None, "processes per GPU that decode image files; "
                                 "default: its share of the cores", low=0)
    save_every: int = option(500, "steps between checkpoints")
    log_every: int = option(50, "steps between log lines")
    fresh: bool = option(False, "train again what --stage names, instead of resuming")
    export: str = option("", "also write both models, in half precision, to this file")
    dry_run: bool = option(False, "print sizes, arithmetic and memory; train nothing")
    vgg_file: str = option("", "VGG-16 weights of --perceptual, if they cannot be downloaded")
    lpips_file: str = option("", "LPIPS weights of --perceptual, likewise")
    accumulate: int = option(1, "compute a batch in this many parts, to save memory")
    shard: bool = option(False, "spread stage 2's weights over the GPUs (needs adamw)")
    activation_checkpointing: bool = option(False, "stage 2 keeps less memory and computes more")
    held_out: int = 1000                  # images that stage 1 is judged by (stage 2: 2,000)
    # How a recipe states steps and lr. What follows from them counts, they themselves do not.
    epochs: int | None = None             # passes of stage 2 over the images, whatever the batch
    lr_per_256: float | None = None       # learning rate of stage 2 for every 256 images of a batch
    cfg: float = 1.5                      # default guidance when sampling from this run
    top_k: int = field(default=0, metadata=dict(low=0))        # default top-k (0: off)
    top_p: float = 0.0                    # default top-p (0: off)


@dataclass
class SharedSettings:
    """Settings that both stages depend on."""
    dataset: str = option("shapes", "a name in data/registry.py (shapes, cifar10, imagenet, ...), "
                          "or the path of a folder")
    seed: int = option(0, "same seed, same run", low=0)
    precision: str = option("auto", "auto is bfloat16 where it is fast, on older GPUs float16",
                            choices=("auto", "float32", "bfloat16", "float16"))
    optimizer: str = option("muon", "of the block matrices; the rest is always adamw",
                            choices=tuple(OPTIMIZERS))
    muon_lr: float = 0.02                 # peak learning rate of muon
    clip: float = 2.0                     # largest gradient norm


@dataclass
class TokenizerSettings(SharedSettings):
    """Stage 1."""
    tokenizer_steps: int = option(1500, "steps of stage 1", low=0)
    tokenizer_batch_size: int = option(16, "images per step of stage 1, over all GPUs")
    tokenizer_lr: float = option(3e-3, "peak learning rate of stage 1")
    flip: bool = option(False, "stage 1 mirrors half of the images")
    perceptual: float = option(0.0, "weight of the perceptual loss (LPIPS); 0: off")
    adversarial: float = option(0.0, "weight of the adversarial loss (PatchGAN); 0: off")
    vq_weight: float = 0.25               # weight of the quantization loss against the image loss
    picture_loss: str = field(default="l2", metadata=dict(choices=("l1", "l2")))


@dataclass
class TransformerSettings(SharedSettings):
    """Stage 2."""
    classes: tuple[str, ...] = option((), "train stage 2 on these classes (names, or wnids of "
                                      "ImageNet) or on the first N; stage 1 uses all images",
                                      nargs="+", metavar="NAME")
    views: int = option(1, "versions of each image in the token cache (mirrored, shifted, ...)")
    steps: int = option(1200, "steps of stage 2", low=0)
    batch_size: int = option(16, "images per step of stage 2, over all GPUs")
    lr: float = option(1.5e-3, "peak learning rate of adamw in stage 2")
    weight_decay: float = 0.05            # of matrices only
    final_weight_decay: float | None = None    # where half a cosine takes it; None: it stays
    final_lr: float = 0.0                 # share of the peak learning rate left at the end
    side_power: float = 1.0               # a token counts 1 / side^this of its map in the loss


@dataclass
class Settings(RunSettings, TransformerSettings, TokenizerSettings):
    """Everything about a run but the sizes of the two models."""

    def __post_init__(self):
        if self.workers is None:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))       # under torchrun
            self.workers = loading_workers(max(self.gpus, local))
        if self.lr_per_256:
            self.lr = self.lr_per_256 * self.batch_size / 256


def check_settings(settings, image_size):
    """Settings that cannot work together. Raises BadInput."""
    processes = max(settings.gpus, int(os.environ.get("WORLD_SIZE", 1)))
    parts = processes * settings.accumulate
    for name in ("tokenizer_batch_size", "batch_size"):
        if getattr(settings, name) % parts:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(settings, name)} must be a "
                           f"multiple of {parts} = {processes} (processes) x "
                           f"{settings.accumulate} (--accumulate)")
    if settings.shard and not OPTIMIZERS[settings.optimizer].works_on_shards:
        raise BadInput(f"--shard needs --optimizer adamw: {settings.optimizer} works on whole "
                       "matrices")
    if settings.shard and processes == 1:
        raise BadInput("--shard spreads weights over processes: give --gpus 2 or more")
    if (settings.vgg_file or settings.lpips_file) and not settings.perceptual:
        raise BadInput("--vgg-file and --lpips-file serve --perceptual: give its weight, say 1")
    if settings.perceptual and image_size < 16:
        raise BadInput("--perceptual needs images of 16 pixels or more")
    if settings.tokenizer_file and settings.stage != "transformer":
        raise BadInput("--tokenizer-file serves stage 2 alone: give --stage transformer")
    if settings.export and not Path(settings.export).absolute().parent.is_dir():
        raise BadInput(f"--export {settings.export}: there is no such folder")


def follow_recipe(settings, images):
    """Steps of stage 2, where epochs are given. -> a line that says what stage 2 takes"""
    if settings.epochs:
        settings.steps = max(1, settings.epochs * images // settings.batch_size)
    epochs = settings.epochs or settings.steps * settings.batch_size / images
    rule = f" = {settings.lr_per_256:g} * batch / 256" if settings.lr_per_256 else ""
    return (f"stage 2: {settings.steps:,} steps of {settings.batch_size} images, {epochs:.3g} "
            f"epochs of {images:,}; learning rate {settings.lr:.3g}{rule}")


def announce(processes, everything, recipe, train, held_out):
    """Print what is trained, on what. everything: {name: value} of all settings; recipe: see
    follow_recipe; train, held_out: how many images"""
    processes.say(textwrap.fill(" ".join(f"{k}={v}" for k, v in everything.items()), 100))
    processes.say(f"{everything['dataset']}: {train} images to train on, {held_out} held out, "
                  f"{everything['num_classes']} classes, {everything['image_size']} px; "
                  f"{processes.world} process(es) on {processes.device.type} in "
                  f"{everything['precision']}")
    if everything["stage"] != "tokenizer":
        processes.say(recipe)


def fields_of(settings, cls):
    """{name: value} of the fields that `cls`, a base class of Settings, has."""
    return {f.name: getattr(settings, f.name) for f in fields(cls)}
