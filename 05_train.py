"""Chapter 5: train. Pictures -> tokenizer -> cached tokens -> transformer; one CPU to many GPUs.

    data --(stage 1)--> tokenizer --(once)--> token cache --(stage 2)--> transformer
             tokenizer.pt            tokens_train.npy          transformer.pt      in out/NAME/

    python 05_train.py                                   built-in shapes on a CPU, minutes
    python 05_train.py --dataset cifar10                 one GPU; downloads and verifies the data
    python 05_train.py --dataset imagenet --data-dir /path/to/imagenet --gpus 8 --depth 16
    python 05_train.py --dataset /path/to/folder         class folders of your own pictures

The same command again goes on where it stopped; --fresh starts over. All settings: --help.

Shapes: image (B, 3, H, W) in [-1, 1]; token cache (views, N, L) integers; logits (B, L, V).

Sources: VAR (Tian et al. 2024), section 4 and the released training code for the ImageNet recipe;
Muon (Jordan et al. 2024) for small models. Every random decision of step s is drawn from (seed,
stage, s, process): nothing about randomness has to be saved to go on bit for bit.

Differs from the original VAR code: stage 1 exists, its losses are those of VQGAN
(engine/perceptual.py), its health is measured scale by scale (report/health.py);
tokens are computed once, not every step.
"""
import functools
import math
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from engine import BadInput, perceptual, plan, released
from report import health
from data.batches import (batch_indices, per_pass, picture_batches, rows_of,
                          sample_of, to_float)
from data.registry import load_data
from data.views import Views
from engine.checkpoints import (export, load_checkpoint, model_fingerprint, resume, save,
                                save_atomically)
from engine.devices import pick_device
from engine.optimizers import make_optimizers, parameter_groups, set_schedule
from engine.options import OneLineParser, add_options, assignment, one_line
from engine.progress import clock
from engine.run import Run, launch
from engine.settings import (Settings, TokenizerSettings, TransformerSettings, check,
                             follow_recipe, identity)
from engine.token_cache import cache_tokens

vqvae = import_module("02_multiscale_vqvae")
transformer = import_module("04_var_transformer")


# -- Settings --------------------------------------------------------------------------------------

# Sizes of the models that are options of the command line; --set reaches the others.
TOKENIZER_OPTIONS = {"image_size": "side of the square images, in pixels",
                     "vocab_size": "codes of the tokenizer",
                     "quantizer": "vq (learned codes) or lfq (signs)"}
TRANSFORMER_OPTIONS = {"depth": "blocks of the transformer; for imagenet it sets all else"}
# From the side of an image to the side of its last token map, and the maps before it.
LAYOUTS = {
    32: dict(unshuffle=4, scales=(1, 2, 3, 4, 6, 8), multipliers=(1,)),
    64: dict(unshuffle=4, scales=(1, 2, 3, 4, 6, 8), multipliers=(1, 2)),
    128: dict(unshuffle=4, scales=(1, 2, 3, 4, 6, 8, 11, 16), multipliers=(1, 2)),
    256: dict(unshuffle=4, scales=released.SCALES[680], multipliers=(1, 2, 2)),
    512: dict(unshuffle=4, scales=released.SCALES[2240], multipliers=(1, 2, 2)),
}
# The released tokenizer folds 16x16 pixels into a token at every size.
RELEASED_LAYOUTS = {64: dict(scales=(1, 2, 3, 4)), 128: dict(scales=(1, 2, 3, 4, 6, 8)),
                    256: dict(scales=released.SCALES[680]), 512: dict(scales=released.SCALES[2240])}
# A preset may have layouts of its own, and a recipe: depth of the transformer -> more settings.
PRESETS = {
    "shapes": dict(image_size=32, depth=4, width=128, heads=4, drop_path=0.0),
    # Ten minutes planned on one H100: 64 epochs of stage 1; stage 2 sees each of 800,000 views ten
    # times. What was measured, and what is a guess: README, "CIFAR-10 on one GPU".
    "cifar10": dict(image_size=32, vocab_size=1024, channels=96, flip=True, views=16,
                    adversarial=0.2, tokenizer_steps=25_000, tokenizer_batch_size=128, depth=6,
                    width=256, heads=4, shared_adaln=True, drop_path=0.1, steps=30_000,
                    batch_size=256, cfg=2.0, top_p=0.9, held_out=10_000, log_every=200,
                    save_every=1000),
    "folder": dict(image_size=64, vocab_size=1024, views=4, tokenizer_steps=20_000,
                   steps=30_000, tokenizer_batch_size=32, batch_size=64, depth=8, width=384,
                   heads=6),
    "imagenet": dict(released.TOKENIZER, layouts=RELEASED_LAYOUTS, recipe=released.imagenet_recipe,
                     num_classes=1000, learn="ema", views=8, tokenizer_steps=250_000,
                     tokenizer_batch_size=256, tokenizer_lr=1e-4, perceptual=1.0, adversarial=0.5,
                     optimizer="adamw", depth=16, save_every=1000, cfg=1.5, top_k=900, top_p=0.96),
}


def read_settings(argv=None):
    """Command line -> (Settings, TokenizerConfig, dict of VARConfig fields). Defaults, then the
    preset of the data set, then what was typed."""
    classes = Settings, vqvae.TokenizerConfig, transformer.VARConfig
    parser = OneLineParser(description=__doc__.splitlines()[0] + " Defaults in brackets; those of "
                           "a data set are in PRESETS.", allow_abbrev=False)
    for cls, helps in zip(classes, ({}, TOKENIZER_OPTIONS, TRANSFORMER_OPTIONS)):
        add_options(parser, cls, helps)
    parser.add_argument("--set", metavar="NAME=VALUE", nargs="+", action="extend", default=[],
                        type=assignment(*classes), help="any other field of "
                        + ", ".join(cls.__name__ for cls in classes))
    typed = vars(parser.parse_args(argv))
    typed.update(typed.pop("set"))
    name = typed.get("dataset", "shapes")
    preset = PRESETS.get(name, PRESETS["folder"])
    if typed.get("tokenizer_file"):                        # the released one, unless it is ours
        preset = {**preset, **released.TOKENIZER, "layouts": RELEASED_LAYOUTS}
    recipe = preset.get("recipe", lambda depth: {})(typed.get("depth", preset["depth"]))
    values = {**preset, **recipe, **typed}
    values = {**values, **preset.get("layouts", LAYOUTS).get(values["image_size"], {}), **typed}
    for name_typed, rule in (("steps", "epochs"), ("lr", "lr_per_256"),
                             ("weight_decay", "final_weight_decay")):
        if name_typed in typed:                            # it replaces the rule of the recipe
            values[rule] = typed.get(rule)

    def pick(cls):
        return {f.name: values[f.name] for f in fields(cls) if f.name in values}
    settings = Settings(**pick(Settings))
    settings.out = settings.out or os.path.join("out", Path(name).resolve().name
                                                if name not in PRESETS else name)
    config = vqvae.TokenizerConfig(**pick(vqvae.TokenizerConfig))
    var_fields = pick(transformer.VARConfig)
    check(settings, config.image_size)
    transformer.VARConfig(**var_fields)                    # sizes that cannot be: say so at once
    return settings, config, var_fields


# -- The training loop, shared by both stages ------------------------------------------------------

def train(run, stage, total):
    """The loop of both stages, from the last checkpoint to step `total`.

    A stage has a name, a model, optimizers, `about` (what the checkpoint tells of it) and
      batches(start)      what each step from `start` on works on: a tuple of tensors (B, ...)
      parts               its modules, by the name that the checkpoint gives their weights
      loss(model, batch, progress)   -> (loss (), what to remember for the log)
      step_without_gradients(accepted)   of what the optimizers do not move: the codes
      summary(memories)   -> (text, dict) since the last log line
      evaluate()          -> (text, dict) on held-out pictures, a few times and at the end"""
    path, settings = run.folder / f"{stage.name}.pt", run.settings
    start = resume(run, stage, path, total)
    if start >= total:
        return run.say(f"{stage.name}: trained for {start} steps")
    wrapped, taken, in_a_row = run.wrap(stage.model), [], 0
    often = 1 if run.device.type == "cpu" else 10          # looking at a result waits for the GPU
    begin = started = time.time()
    for step, batch in enumerate(stage.batches(start), start=start):
        run.seed(stage.name, step)
        set_schedule(stage.optimizers, step / total, stage.final_lr, stage.final_decay)
        stage.model.train()
        taken.append(take_step(run, stage, wrapped, batch, step / total))
        in_a_row = (in_a_row + 1) * taken[-1].skipped      # a tensor: back to 0 by a good step
        step += 1
        if step % often == 0 and in_a_row >= 10:
            raise BadInput(f"{stage.name}: no finite loss or gradient in {int(in_a_row)} steps, "
                           f"last at step {step - 1}; lower the learning rate and train the stage "
                           f"again: --stage {stage.name} --fresh ({path} is from before)")
        if step % settings.log_every == 0 or step == total:
            report(run, stage, step, total, taken, (time.time() - begin) / (step - start))
            taken = []
        pause = time.time()
        if step in {total * quarter // 4 for quarter in (1, 2, 3, 4)}:
            stage.model.eval()
            text, numbers = stage.evaluate()               # by all: sharded weights need them all
            run.say(f"  held out at step {step}: {text}")
            run.log(dict(stage=stage.name, step=step, held_out=numbers))
        stop = run.stopping(step)
        if step % settings.save_every == 0 or step == total or stop:
            save(run, stage, path, step)
        if stop:
            run.say(f"stopped and saved at step {step} of the {stage.name}: {run.again} goes on "
                    "from there")
            sys.exit(128 + stop)
        if step == total:
            break
        begin += time.time() - pause                       # img/s and eta are those of training
    run.say(f"{stage.name}: steps {start} to {total} in {time.time() - started:.0f} s"
            + run.peak_memory())


@dataclass
class Taken:
    """What a step leaves behind, on the device: nobody has waited for it yet."""
    loss: torch.Tensor                    # ()
    norm: torch.Tensor                    # (), of the gradient before clipping
    skipped: torch.Tensor                 # () bool
    memories: list                        # of each part of the batch


def take_step(run, stage, wrapped, batch, progress):
    """Gradients of one batch, in parts if asked, then the optimizers' step. Where any gradient is
    not finite, nothing changes: one bad batch must not spoil all. -> Taken"""
    parts = list(zip(*[tensor.chunk(run.settings.accumulate) for tensor in batch]))
    loss, memories = 0, []
    for i, part in enumerate(parts):
        with run.exchange(wrapped, now=i == len(parts) - 1):
            part_loss, memory = stage.loss(wrapped, part, progress)
            (part_loss / len(parts)).backward()
        loss = loss + part_loss.detach() / len(parts)
        memories.append(memory)
    norms = [torch.nn.utils.clip_grad_norm_(
                 part.parameters(), run.settings.clip if part is stage.model else torch.inf)
             for part in stage.parts.values()]
    norm = getattr(norms[0], "full_tensor", lambda: norms[0])()          # whole, if sharded
    skipped = run.total(1.0 * ~(loss + norm + sum(norms[1:])).isfinite()) > 0     # by all or none
    stage.step_without_gradients(accepted=~skipped)
    for optimizer in stage.optimizers:
        optimizer.found_inf = skipped.float()              # on a GPU optimizers look at it, so
        if run.device.type == "cuda" or not skipped:       # that nobody has to wait
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Taken(loss, norm, skipped, memories)


def report(run, stage, step, total, taken, pace):
    """The log line, and the same as JSON."""
    skipped = [bool(t.skipped) for t in taken]
    good = [t for t, bad in zip(taken, skipped) if not bad] or taken
    loss = float(run.mean(torch.stack([t.loss for t in good]).mean()))
    text, numbers = stage.summary([memory for t in good for memory in t.memories])
    lr, norm = stage.optimizers[0].param_groups[0]["lr"], float(good[-1].norm)
    if any(skipped):
        text, numbers["skipped"] = f"{text} | skipped {sum(skipped)}", sum(skipped)
    run.say(f"{stage.name} {step}/{total} ({100 * step // total}%) | loss {loss:.4g} | {text} | "
            f"lr {lr:.1e} | grad {norm:.2f} | {stage.batch_size / pace:.0f} img/s | "
            f"eta {clock(pace * (total - step))}")
    run.log(dict(stage=stage.name, step=step, loss=loss, lr=lr, grad=norm, **numbers))


# -- Stage 1: the tokenizer ------------------------------------------------------------------------

class TokenizerStage:
    name = "tokenizer"
    spoils = "transformer.pt"                              # --fresh deletes it: of other tokens
    final_lr, final_decay = 0.0, None

    def __init__(self, run, config, train_images, test_images, class_names):
        settings = self.settings = run.settings
        torch.manual_seed(settings.seed)
        self.run, self.batch_size = run, settings.tokenizer_batch_size
        self.images, = run.hold(train_images)
        self.held_out = sample_of(test_images, settings.held_out)
        self.model = vqvae.MultiScaleVQVAE(config).to(run.device)
        self.parts = {"model": self.model}
        self.optimizers = make_optimizers(self.model, settings.tokenizer_lr, 1e-4, settings)
        if settings.adversarial:
            critic = perceptual.Discriminator(config.image_size).to(run.device)
            self.parts["critic"] = critic
            self.critic = run.wrap(critic)
            # Two more gradients end at the decoder's last layer. A compiled graph always computes
            # all of its gradients, so this layer stays outside.
            last = self.model.decoder.conv_out
            last.forward = torch.compiler.disable(last.forward)
            self.optimizers.append(torch.optim.AdamW(
                critic.parameters(), lr=min(settings.tokenizer_lr, 3e-4), betas=(0.5, 0.9),
                fused=True))
        self.about = dict(config=asdict(config), class_names=class_names, dataset=settings.dataset,
                          settings={**identity(settings, TokenizerSettings), **asdict(config)})

    @functools.cached_property
    def perceptual(self):
        """LPIPS, loaded at the first step: to read a finished tokenizer nobody needs it."""
        weights = self.settings.vgg_file, self.settings.lpips_file
        return perceptual.load_perceptual(*weights).to(self.run.device)

    def batches(self, start):
        seed = self.settings.seed
        wanted = ([(int(i), seed * 10 ** 9 + step) for i in self.run.share(
                    batch_indices(step, len(self.images), self.batch_size, seed))]
                for step in range(start, self.settings.tokenizer_steps))
        return zip(picture_batches(self.images, wanted, self.settings.workers))      # tuples of one

    def loss(self, model, batch, progress):
        settings, image = self.settings, to_float(self.run.to_device(batch[0]))
        if settings.flip:
            mirrored = torch.rand(len(image), 1, 1, 1, device=image.device) < 0.5
            image = torch.where(mirrored, image.flip(3), image)
        with self.run.autocast():
            rebuilt, tokens, losses = model(image)
            picture = losses["reconstruction"]
            if settings.picture_loss == "l1":
                picture = F.l1_loss(rebuilt.float(), image)
            if settings.perceptual:
                picture = picture + settings.perceptual * self.perceptual(rebuilt, image).mean()
        loss = picture + settings.vq_weight * (losses["vq"] + losses["extra"])
        if share := settings.adversarial * perceptual.start_late(progress):
            loss = loss + share * self.criticise(image, rebuilt, picture)
        return loss, (losses["reconstruction"].detach(), tokens)

    def criticise(self, image, rebuilt, picture):
        """The critic learns from this batch (its optimizer steps with the others).
        -> what the tokenizer adds to its loss to please the critic, as heavy as `picture`"""
        with self.run.autocast():
            scores = self.critic(torch.cat([image, rebuilt.detach()]))
        (perceptual.hinge(*scores.float().chunk(2)) / self.settings.accumulate).backward()
        critic = self.parts["critic"].requires_grad_(False)      # the next pass teaches it nothing
        with self.run.autocast():
            displeased = -critic(rebuilt).float().mean()
        critic.requires_grad_(True)
        last = self.model.decoder.conv_out.weight
        return perceptual.adaptive_weight(picture, displeased, last) * displeased

    def step_without_gradients(self, accepted):
        self.model.quantizer.update(accepted)

    def summary(self, memories):
        error = self.run.mean(torch.stack([error for error, _ in memories]).mean())
        db = float(10 * torch.log10(4 / error))
        seen = [torch.cat(tokens) for tokens in zip(*[tokens for _, tokens in memories])]
        counts = self.run.total(health.count_codes(seen, self.model.config.vocab_size))
        numbers = health.usage(counts)
        return f"psnr {db:.1f} dB | {health.short(self.model.scales, numbers)}", dict(
            psnr=db, **numbers)

    def evaluate(self):
        images = (to_float(part.to(self.run.device)) for part in
                  self.held_out.split(per_pass(self.held_out.shape[1])))
        numbers = health.examine(self.model, images, self.run.autocast)
        stride = max(1, len(self.held_out) // 10)             # test sets come sorted by class
        if self.run.rank == 0:
            health.save_picture(self.run.folder / "reconstructions.png", self.model,
                                to_float(self.held_out[::stride][:10].to(self.run.device)))
        numbers["warnings"] = health.warnings(self.model, numbers, len(self.held_out))
        most = min(1, len(self.held_out) * sum(s * s for s in self.model.scales)
                   / self.model.config.vocab_size)         # each token can be one code at most
        text = "\n".join([f"psnr {numbers['psnr']:.2f} dB | used {numbers['used_overall']:.0%} of "
                          f"the codes{'' if most == 1 else f' ({most:.0%} possible)'} | "
                          f"{len(self.held_out)} pictures",
                          health.table(self.model.scales, numbers), *numbers["warnings"]])
        return text, numbers


def load_tokenizer(path, device="cpu"):
    """-> (frozen MultiScaleVQVAE in eval mode, its checkpoint without the weights)"""
    return build(path, "tokenizer", vqvae.TokenizerConfig, vqvae.MultiScaleVQVAE, device)


def load_transformer(path, device="cpu"):
    """-> (frozen VAR in eval mode, its checkpoint without the weights)"""
    return build(path, "transformer", transformer.VARConfig, transformer.VAR, device)


def build(path, part, config_class, model_class, device):
    state = load_checkpoint(path)                          # the optimizer's part stays on the CPU
    state = state.get(part, state)                         # a shipped file holds both models
    for part_of_training in ("optimizers", "critic"):
        state.pop(part_of_training, None)
    try:
        model = model_class(config_class(**state.pop("config")))
        model.load_state_dict(state.pop("model"))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise BadInput(f"{path}: does not hold a {part} ({reason})") from None
    return model.to(device).eval().requires_grad_(False), state


def open_tokenizer(path, scales):
    """--tokenizer-file: a tokenizer trained here, or one in the released layout, whose token maps
    are to have the sides `scales`. -> frozen MultiScaleVQVAE in eval mode"""
    state = load_checkpoint(path)
    if {"config", "tokenizer"} & state.keys():
        return load_tokenizer(path)[0]
    sizes, weights = released.read_tokenizer(state, scales)
    with released.other_layouts_refused(), torch.device("meta"):    # no time for random weights
        tokenizer = vqvae.MultiScaleVQVAE(vqvae.TokenizerConfig(**sizes))
    return released.fill(tokenizer, weights)


def tokenizer_of_stage_2(settings, path, scales):
    """The tokenizer in `path`, the run's, or that of --tokenizer-file. -> MultiScaleVQVAE
    Raises BadInput if there is none, or another one than the run began with."""
    if not settings.tokenizer_file and not path.exists():
        raise BadInput(f"no tokenizer in {path.parent}: train it first, with --stage tokenizer, or "
                       "give --tokenizer-file")
    if not settings.tokenizer_file:
        return load_tokenizer(path)[0]
    tokenizer = open_tokenizer(settings.tokenizer_file, scales)
    if path.exists() and not settings.fresh and (
            model_fingerprint(tokenizer) != model_fingerprint(load_tokenizer(path)[0])):
        raise BadInput(f"{path} is another tokenizer than {settings.tokenizer_file}; --fresh "
                       "starts over with the latter, --out takes another folder")
    return tokenizer


# -- Stage 2: the transformer ----------------------------------------------------------------------

class TransformerStage:
    name = "transformer"

    def __init__(self, run, tokenizer, config, data, class_names):
        """data: {"train": (tokens (views, N, L), labels (N,)), "test": the same}"""
        settings = self.settings = run.settings
        torch.manual_seed(settings.seed)
        self.run, self.tokenizer = run, tokenizer
        self.data = {split: run.hold(*arrays) for split, arrays in data.items()}
        self.batch_size, self.sizes = settings.batch_size, [s * s for s in config.scales]
        self.final_lr, self.final_decay = settings.final_lr, settings.final_weight_decay
        self.model = transformer.VAR(config)
        self.model.activation_checkpointing = settings.activation_checkpointing
        # Only the matrices are shared out and multiplied in half precision. What is left in a block
        # is small and stays float32: 7 bits would not do for the attention's factor.
        run.place(self.model, [layer for layer in self.model.blocks.modules()
                               if isinstance(layer, torch.nn.Linear)])
        self.parts = {"model": self.model}
        self.optimizers = make_optimizers(self.model, settings.lr, settings.weight_decay, settings)
        self.about = dict(config=asdict(config), class_names=class_names, dataset=settings.dataset,
                          sampling={k: getattr(settings, k) for k in ("cfg", "top_k", "top_p")},
                          settings={**identity(settings, TransformerSettings), **asdict(config),
                                    "tokenizer": model_fingerprint(tokenizer)})

    def rows(self, split, at):
        """Rows of the token cache, counted through all views. -> tokens (B, L), labels (B,)"""
        tokens, labels = self.data[split]
        _, n, L = tokens.shape
        if torch.is_tensor(tokens):
            at = self.run.to_device(torch.from_numpy(at))
            return tokens.view(-1, L)[at].long(), labels[at % n]
        found = torch.from_numpy(tokens.reshape(-1, L)[at].astype(np.int64))
        return self.run.to_device(found), self.run.to_device(torch.from_numpy(labels[at % n]))

    def batches(self, start):
        views, n, _ = self.data["train"][0].shape
        for step in range(start, self.settings.steps):
            at = batch_indices(step, views * n, self.batch_size, self.settings.seed + 1)
            yield self.rows("train", self.run.share(at))

    def per_token(self, model, tokens, labels):
        """-> (cross-entropy in nats (B, L), right (B, L) bool)"""
        with torch.no_grad():
            inputs = self.tokenizer.teacher_inputs(list(tokens.split(self.sizes, 1)))
        with self.run.autocast():
            logits = model(labels, inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none")
        return loss.view_as(tokens), logits.argmax(-1) == tokens

    def loss(self, model, batch, progress):
        loss, right = self.per_token(model, *batch)
        return loss.mean(), (loss.detach().mean(0), right.float().mean())

    def step_without_gradients(self, accepted):
        """All of the transformer learns by gradients."""

    def summary(self, memories):
        loss = self.run.mean(torch.stack([loss for loss, _ in memories]).mean(0))
        right = self.run.mean(torch.stack([right for _, right in memories]).mean())
        return self.describe(loss, float(right))

    def describe(self, loss, right):
        scales = [float(part.mean()) for part in loss.split(self.sizes)]
        text = f"per-scale {' '.join(f'{x:.2f}' for x in scales)} | right {right:.1%}"
        numbers = dict(per_scale=scales, right=right)
        # Half precision cannot tell products apart that are multiplied by much: 100 is the most.
        if self.settings.precision != "float32" and self.model.config.qk_norm:
            found = [block.attention.log_scale.detach().max() for block in self.model.blocks]
            largest = max(float(getattr(x, "full_tensor", lambda x=x: x)()) for x in found)
            numbers["qk_factor"] = min(math.exp(largest), 100.0)
            text += f" | qk {numbers['qk_factor']:.0f}"
        return text, numbers

    @torch.no_grad()
    def evaluate(self):
        chosen = rows_of(len(self.data["test"][1]), 2000)
        found = [self.per_token(self.model, *self.rows("test", part))
                 for part in np.array_split(chosen, -(-len(chosen) // 100))]
        loss = torch.cat([loss for loss, _ in found]).mean(0)
        right = float(torch.cat([right for _, right in found]).float().mean())
        text, numbers = self.describe(loss, right)
        return f"loss {float(loss.mean()):.3f} | {text}", dict(loss=float(loss.mean()), **numbers)


# -- The whole road --------------------------------------------------------------------------------

def relaunch(settings):
    """Start this command once per GPU (on a CPU: N processes over gloo). -> exit status"""
    device = pick_device(settings.device).type
    if device == "cuda" and settings.gpus > torch.cuda.device_count():
        raise BadInput(f"--gpus {settings.gpus}: this machine has {torch.cuda.device_count()}")
    if device == "mps":
        raise BadInput("--gpus: an Apple GPU works alone; use --gpus 1 or --device cpu")
    if device == "cpu" and settings.device == "auto":
        raise BadInput(f"--gpus {settings.gpus}: torch finds no GPU here; with --device cpu as "
                       "many processes share the CPU")
    return launch(settings.gpus)


def var_sizes(var_fields, config, num_classes):
    """What the transformer has from its tokenizer and from the data, and what was asked for."""
    return transformer.VARConfig(**{**var_fields, "num_classes": num_classes,
                                    "scales": config.scales, "vocab_size": config.vocab_size,
                                    "latent_dim": config.latent_dim})


def train_all(settings, config, var_fields):
    run = Run(settings)

    def load(split):
        return load_data(settings.dataset, split, config.image_size, settings.data_dir)
    path = run.folder / "tokenizer.pt"
    if settings.stage == "transformer":                    # its tokenizer sets the picture size
        tokenizer = tokenizer_of_stage_2(settings, path, config.scales)
        config = tokenizer.config
    train_data = load("train") if run.rank == 0 else None  # a download happens once, not N times
    run.barrier()
    images, labels, class_names = train_data or load("train")
    test_images, test_labels, _ = load("test")
    recipe = follow_recipe(settings, len(images))
    run.everything = {**asdict(settings), **asdict(config), **var_fields}
    run.say(textwrap.fill(" ".join(f"{k}={v}" for k, v in run.everything.items()), 100))
    run.say(f"{settings.dataset}: {len(images)} pictures to train on, {len(test_images)} held out, "
            f"{len(class_names)} classes, {config.image_size} px; {run.world} process(es) on "
            f"{run.device.type} in {settings.precision}")
    if settings.stage != "tokenizer":
        run.say(recipe)
    if settings.stage != "transformer":
        stage = TokenizerStage(run, config, images, test_images, class_names)
        train(run, stage, settings.tokenizer_steps)
    if settings.stage == "tokenizer":
        return
    if settings.tokenizer_file and run.rank == 0 and (settings.fresh or not path.exists()):
        # From here on it is the run's own: to resume or to sample, the file is not needed.
        run.folder.mkdir(parents=True, exist_ok=True)
        save_atomically(dict(config=asdict(config), model=tokenizer.state_dict(), step=0,
                             class_names=class_names, dataset=settings.dataset, settings={}), path)
    run.barrier()
    tokenizer, about = load_tokenizer(path, run.device)
    if about["step"] < (planned := about["settings"].get("tokenizer_steps", 0)):
        run.say(f"note: the tokenizer was trained for {about['step']} steps of {planned}")
    views = Views(images, settings.views, settings.workers)
    test_views = Views(test_images, 1, settings.workers)
    data = {"train": (cache_tokens(run, tokenizer, views, "train"), labels),
            "test": (cache_tokens(run, tokenizer, test_views, "test"), test_labels)}
    sizes = var_sizes(var_fields, tokenizer.config, len(class_names))
    train(run, TransformerStage(run, tokenizer, sizes, data, class_names), settings.steps)
    if run.rank == 0 and settings.export:
        export(run.folder, settings.export)
    if run.rank == 0 and settings.steps:                   # chapter 6, as you would call it
        script = Path(__file__).with_name("06_sample_and_edit.py")
        subprocess.call([sys.executable, str(script), "--run", str(run.folder), "--out",
                         str(run.folder), "--device", run.device.type,
                         "--data-dir", settings.data_dir])


def dry_run(settings, config, var_fields):
    """Print what a training takes. Nothing is read, written or trained."""
    sizes = var_sizes(var_fields, config, var_fields.get("num_classes", 10))
    side, L = config.image_size, sum(side * side for side in config.scales)
    with torch.device("meta"):                             # tensors with shapes but no memory
        tokenizer, var = vqvae.MultiScaleVQVAE(config), transformer.VAR(sizes).to("meta")
        image, labels = torch.zeros(1, 3, side, side), torch.zeros(1, dtype=torch.long)
        inputs = torch.zeros(1, L - config.scales[0] ** 2, config.latent_dim)
    print(f"dry run: an image of {side} x {side} is {L} tokens, {len(config.scales)} maps of sides "
          f"{', '.join(map(str, config.scales))}\n{plan.HEADER}")
    plan.show("tokenizer", tokenizer, lambda: tokenizer.decode(tokenizer.encode(image)),
              settings.tokenizer_batch_size, f"{settings.tokenizer_steps:,}",
              parameter_groups(tokenizer, settings.optimizer))
    plan.show("transformer", var, lambda: var(labels, inputs), settings.batch_size,
              f"{settings.epochs} epochs" if settings.epochs else f"{settings.steps:,}",
              parameter_groups(var, settings.optimizer))
    size = settings.views * L * (2 if config.vocab_size < 65536 else 4)
    print(f"token cache: {settings.views} views, {size / 1e3:.3g} MB for every 1,000 images\n"
          "TFLOP: forward and backward pass of one batch, without LPIPS and critic\nGB: on every "
          "GPU, in float32 (--shard divides them); activations come on top")


def main():
    settings, config, var_fields = read_settings()
    if settings.dry_run:
        return dry_run(settings, config, var_fields)
    if settings.gpus > 1 and "RANK" not in os.environ:
        load_data(settings.dataset, "test", config.image_size, settings.data_dir)   # or fail here
        return relaunch(settings)
    return train_all(settings, config, var_fields)


if __name__ == "__main__":
    one_line(main)
