"""Chapter 5: train. Images -> tokenizer -> cached tokens -> transformer; one CPU to many GPUs.

    data --(stage 1)--> tokenizer --(once)--> token cache --(stage 2)--> transformer
             tokenizer.pt            tokens_train.npy          transformer.pt      in out/NAME/

    python 05_train.py                                   built-in shapes on a CPU, minutes
    python 05_train.py --dataset cifar10                 one GPU; downloads and verifies the data
    python 05_train.py --dataset imagenet --data-dir /path/to/imagenet --gpus 8 --depth 16
    python 05_train.py --dataset /path/to/folder         class folders of your own images
    python 05_train.py --dataset /path/to/folder --stage transformer \\
        --tokenizer-file vae_ch160v4096z32.pth           stage 2 on the released tokenizer

The same command again resumes; --fresh starts over. All options: --help.
Read `train_step`, `TokenizerStage.loss` and `TransformerStage.per_token` first.

Shapes: image (B, 3, H, W) in [-1, 1]; token cache (views, N, L) integers; logits (B, L, V).

Sources: VAR (Tian et al. 2024), section 4 and the released training code for the ImageNet recipe;
Muon (Jordan et al. 2024) for small models (engine/optimizers.py). All randomness of step s comes
from (seed, stage, s, process), so a run resumes bit for bit although no random state is saved.

Differs from the original VAR code: stage 1 exists, with the losses of VQGAN (engine/perceptual.py)
and a health check of every scale (report/health.py); images are tokenized once, not in every step;
in the loss a token counts 1 / side of its map, but in the recipe for ImageNet (side_power).
"""
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from engine import BadInput, checkpoints, perceptual, plan, released
from report import health
from data.batches import batch_indices, picture_batches, rows_of, sample_of, to_float
from data.registry import load_data, load_splits
from data.views import Views
from engine.checkpoints import load_checkpoint, load_part, model_fingerprint
from engine.devices import (autocast, choose_precision, free_gpu_memory, lay_out,
                            move_small_arrays_to_gpu, peak_memory, reset_peak_memory, to_device)
from engine.guard import SkippedInARow, clip_gradients, step_unless
from engine.loss_scale import LossScale
from engine.optimizers import make_optimizers, set_schedule
from engine.options import one_line, read_options
from engine.presets import TOKENIZER_OPTIONS, TRANSFORMER_OPTIONS, fill_in
from engine.processes import Processes, relaunch, sync_gradients
from engine.progress import Stopwatch, clock
from engine.run_folder import RunFolder
from engine.settings import (Settings, TokenizerSettings, TransformerSettings, announce,
                             check_settings, fields_of, follow_recipe)
from engine.stop import StopSignal
from engine.token_cache import cache_tokens, cached_rows

vqvae = import_module("02_multiscale_vqvae")
transformer = import_module("04_var_transformer")


# -- Settings --------------------------------------------------------------------------------------

def read_settings(argv=None):
    """Command line -> (Settings, TokenizerConfig, VARConfig as far as known before the data)"""
    options = {Settings: {}, vqvae.TokenizerConfig: TOKENIZER_OPTIONS,
               transformer.VARConfig: TRANSFORMER_OPTIONS}
    values = fill_in(read_options(argv, __doc__.splitlines()[0], options))
    picked = [{f.name: values[f.name] for f in fields(cls) if f.name in values} for cls in options]
    settings, config, var_config = [cls(**sizes) for cls, sizes in zip(options, picked)]
    check_settings(settings, config.image_size)
    return settings, config, var_config


# -- The training loop, shared by both stages ------------------------------------------------------

def seed_step(seed, stage, step, rank):
    """All randomness of one step in one process."""
    parts = [seed, ["tokenizer", "transformer"].index(stage), step, rank]
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))


@dataclass
class StepResult:
    """What a step returns. The tensors are still on the device: reading one waits for a GPU."""
    loss: torch.Tensor                    # ()
    norm: torch.Tensor                    # (), of the model's gradient before clipping
    skipped: torch.Tensor                 # () bool: something was not finite, nothing has changed
    metrics: list                         # for the log, one entry for each part of the batch


def train_step(stage, model, batch, progress):
    """Forward, backward, clip, step. batch: tuple of tensors (B, ...) -> StepResult"""
    # Exercise 05_2
    parts = list(zip(*[tensor.chunk(stage.settings.accumulate) for tensor in batch]))
    loss, metrics = 0, []
    for i, part in enumerate(parts):
        with sync_gradients(model, now=i == len(parts) - 1):
            part_loss, part_metrics = stage.loss(model, part, progress)
            stage.loss_scale.scale(part_loss / len(parts)).backward()
        loss = loss + part_loss.detach() / len(parts)
        metrics.append(part_metrics)
    # End of exercise
    stage.loss_scale.unscale(stage.modules.values())
    # Only the model's gradient is clipped. That of the critic has to be finite, too.
    norms = [clip_gradients(module, stage.settings.clip if module is stage.model else torch.inf)
             for module in stage.modules.values()]
    skipped = stage.processes.any(~(loss + sum(norms)).isfinite())       # in all processes or none
    stage.step_without_gradients(accepted=~skipped)
    step_unless(skipped, stage.optimizers)
    stage.loss_scale.update(skipped)
    return StepResult(loss, norms[0], skipped, metrics)


def train(stage, folder, stop, everything):
    """The loop of both stages, from the last checkpoint to the stage's last step.

    A stage has settings, processes, a name, a model, optimizers, a loss scale, steps, and
      batches(start)      the batch of each step from `start` on: a tuple of tensors (B, ...)
      modules             the modules to save, by their name in the checkpoint
      loss(model, batch, progress)       -> (loss (), what to keep for the log)
      step_without_gradients(accepted)   moves what the optimizers do not move: the codes
      summary(metrics)    -> (text, dict) for the log, of the steps since the last line
      evaluate()          -> (text, dict) on held-out images
      about               what else the checkpoint says; its "settings" must stay the same
    everything: dict of all settings, for settings.json"""
    settings, processes, total = stage.settings, stage.processes, stage.steps
    start = checkpoints.begin(stage, folder, everything)
    if start >= total:
        return processes.say(f"{stage.name}: trained for {start} steps")
    model, results = processes.wrap(stage.model, settings.compile), []
    in_a_row = SkippedInARow(stage.name, processes.device)
    reset_peak_memory(processes.device)
    watch, since_start = Stopwatch(), Stopwatch()
    evaluate_at = {total * quarter // 4 for quarter in (1, 2, 3, 4)}
    for step, batch in enumerate(stage.batches(start), start=start + 1):
        progress = (step - 1) / total
        seed_step(settings.seed, stage.name, step - 1, processes.rank)
        set_schedule(stage.optimizers, progress, stage.final_lr, stage.final_decay)
        stage.model.train()
        result = train_step(stage, model, batch, progress)
        results.append(result)
        in_a_row.add(step, result.skipped & stage.loss_scale.is_lowest)
        if step % settings.log_every == 0 or step == total:
            report(stage, step, results, watch.seconds() / (step - start), folder)
            results = []
        with watch.paused():
            if step in evaluate_at:
                stage.model.eval()
                text, numbers = stage.evaluate()           # sharded weights need every process
                processes.say(f"  held out at step {step}: {text}")
                folder.log(dict(stage=stage.name, step=step, held_out=numbers))
            stopping = stop.agreed(step)
            if step % settings.save_every == 0 or step == total or stopping:
                checkpoints.save(folder.checkpoint(stage.name), stage, step)
            if stopping:
                stop.leave(f"and saved at step {step} of the {stage.name}")
    processes.say(f"{stage.name}: steps {start} to {total} in {since_start.seconds():.0f} s"
                  + peak_memory(processes.device))


def report(stage, step, results, seconds, folder):
    """The log line, and the same as JSON. seconds: of one step"""
    skipped = [bool(result.skipped) for result in results]
    good = [result for result, bad in zip(results, skipped) if not bad] or results
    loss = float(stage.processes.mean(torch.stack([result.loss for result in good]).mean()))
    text, numbers = stage.summary([part for result in good for part in result.metrics])
    lr, norm = stage.optimizers[0].param_groups[0]["lr"], float(good[-1].norm)
    if any(skipped):
        numbers["skipped"] = sum(skipped)
        text += f" | skipped {sum(skipped)}"
    stage.processes.say(
        f"{stage.name} {step}/{stage.steps} ({100 * step // stage.steps}%) | loss {loss:.4g} | "
        f"{text} | lr {lr:.1e} | grad {norm:.2f} | {stage.batch_size / seconds:.0f} img/s | "
        f"eta {clock(seconds * (stage.steps - step))}")
    folder.log(dict(stage=stage.name, step=step, loss=loss, lr=lr, grad=norm, **numbers))


# -- Stage 1: the tokenizer ------------------------------------------------------------------------

class TokenizerStage:
    name, final_lr, final_decay = "tokenizer", 0.0, None
    fresh_removes = "tokenizer.pt", "transformer.pt"       # the latter is of other tokens

    def __init__(self, settings, processes, folder, config, images, test_images, class_names):
        self.settings, self.processes, self.folder = settings, processes, folder
        self.steps, self.batch_size = settings.tokenizer_steps, settings.tokenizer_batch_size
        self.autocast = partial(autocast, processes.device, settings.precision)
        torch.manual_seed(settings.seed)
        self.images, = move_small_arrays_to_gpu((images,), processes.device)
        self.held_out = sample_of(test_images, settings.held_out)
        self.model = lay_out(vqvae.MultiScaleVQVAE(config), processes.device, settings.precision)
        self.loss_scale = LossScale(settings.precision).to(processes.device)
        self.modules = {"model": self.model, "loss_scale": self.loss_scale}
        self.optimizers = make_optimizers(self.model, settings.tokenizer_lr, 1e-4, settings)
        if settings.adversarial:
            self.critic = perceptual.Critic(settings, processes, config.image_size,
                                            self.model.decoder.conv_out, self.loss_scale)
            self.modules["critic"] = self.critic.network
            self.optimizers.append(self.critic.optimizer)
        self.about = dict(config=asdict(config), class_names=class_names, dataset=settings.dataset,
                          settings={**fields_of(settings, TokenizerSettings), **asdict(config)})

    @cached_property
    def perceptual(self):
        """LPIPS, loaded at the first step. A finished tokenizer does not need it."""
        weights = self.settings.vgg_file, self.settings.lpips_file
        return perceptual.load_perceptual(*weights).to(self.processes.device)

    def batches(self, start):
        wanted = map(self.share_of, range(start, self.steps))
        return zip(picture_batches(self.images, wanted, self.settings.workers))      # tuples of one

    def share_of(self, step):
        """This process's images of a step. -> [(index, seed of the image's random crop)]"""
        seed = self.settings.seed
        indices = batch_indices(step, len(self.images), self.batch_size, seed)
        return [(int(i), seed * 10 ** 9 + step) for i in self.processes.share(indices)]

    def loss(self, model, batch, progress):
        settings, image = self.settings, to_float(to_device(batch[0], self.processes.device))
        if settings.flip:
            mirrored = torch.rand(len(image), 1, 1, 1, device=image.device) < 0.5
            image = torch.where(mirrored, image.flip(3), image)
        with self.autocast():
            rebuilt, tokens, losses = model(image)
            image_loss = losses["reconstruction"]
            if settings.picture_loss == "l1":
                image_loss = F.l1_loss(rebuilt.float(), image)
            if settings.perceptual:
                distance = self.perceptual(rebuilt, image).mean()
                image_loss = image_loss + settings.perceptual * distance
        loss = image_loss + settings.vq_weight * (losses["vq"] + losses["extra"])
        if share := settings.adversarial * perceptual.start_late(progress):
            loss = loss + share * self.critic.loss(image, rebuilt, image_loss)
        return loss, (losses["reconstruction"].detach(), tokens)

    def step_without_gradients(self, accepted):
        self.model.quantizer.update(accepted)

    def summary(self, metrics):
        error = self.processes.mean(torch.stack([error for error, _ in metrics]).mean())
        db = float(health.decibels(error))
        seen = [torch.cat(tokens) for tokens in zip(*[tokens for _, tokens in metrics])]
        counts = self.processes.total(health.count_codes(seen, self.model.config.vocab_size))
        numbers = health.usage(counts)
        text = f"psnr {db:.1f} dB | {health.short(self.model.scales, numbers)}"
        return text, dict(psnr=db, **numbers)

    def evaluate(self):
        sheet = self.folder.path / "reconstructions.png" if self.folder.writes else None
        return health.check_up(self.model, self.held_out, self.processes.device, self.autocast,
                               sheet)


# -- Stage 2: the transformer ----------------------------------------------------------------------

class TransformerStage:
    name, fresh_removes, model_class = "transformer", ("transformer.pt",), transformer.VAR

    def __init__(self, settings, processes, tokenizer, config, data, class_names):
        """data: {"train": (tokens (views, N, L), labels (N,)), "test": the same}"""
        self.settings, self.processes, self.tokenizer = settings, processes, tokenizer
        self.steps, self.batch_size = settings.steps, settings.batch_size
        self.sizes = [s * s for s in config.scales]
        # Half of all tokens are of the last map, but coarse ones decide what is drawn: 1 / side.
        weight = torch.cat([torch.full((n,), n ** (-settings.side_power / 2)) for n in self.sizes])
        self.token_weight = (weight / weight.mean()).to(processes.device)            # (L,)
        self.autocast = partial(autocast, processes.device, settings.precision)
        torch.manual_seed(settings.seed)
        self.data = {split: move_small_arrays_to_gpu(arrays, processes.device)
                     for split, arrays in data.items()}
        self.final_lr, self.final_decay = settings.final_lr, settings.final_weight_decay
        self.model = self.model_class(config)
        self.model.activation_checkpointing = settings.activation_checkpointing
        if settings.shard:
            processes.shard(self.model, settings.precision)
        else:
            self.model.to(processes.device)
        self.loss_scale = LossScale(settings.precision).to(processes.device)
        self.modules = {"model": self.model, "loss_scale": self.loss_scale}
        self.optimizers = make_optimizers(self.model, settings.lr, settings.weight_decay, settings)
        self.about = dict(config=asdict(config), class_names=class_names, dataset=settings.dataset,
                          sampling={k: getattr(settings, k) for k in ("cfg", "top_k", "top_p")},
                          settings=self.identity(settings, tokenizer, config))

    @staticmethod
    def identity(settings, tokenizer, config):
        """What must be the same when the stage is resumed."""
        return {**fields_of(settings, TransformerSettings), **asdict(config),
                "tokenizer": model_fingerprint(tokenizer)}

    def rows(self, split, indices):
        """Rows of the token cache, counted through all views. -> tokens (B, L), labels (B,)"""
        return cached_rows(*self.data[split], indices, self.processes.device)

    def batches(self, start):
        views, n, _ = self.data["train"][0].shape
        for step in range(start, self.steps):
            indices = batch_indices(step, views * n, self.batch_size, self.settings.seed + 1)
            yield self.rows("train", self.processes.share(indices))

    def per_token(self, model, tokens, labels):
        """-> (cross-entropy in nats (B, L), right (B, L) bool)"""
        # Exercise 05_1
        with torch.no_grad():
            inputs = self.tokenizer.teacher_inputs(list(tokens.split(self.sizes, 1)))
        with self.autocast():
            logits = model(labels, inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none")
        return loss.view_as(tokens), logits.argmax(-1) == tokens

    def loss(self, model, batch, progress):
        loss, right = self.per_token(model, *batch)
        return (self.token_weight * loss).mean(), (loss.detach().mean(0), right.float().mean())

    def step_without_gradients(self, accepted):
        """All of the transformer learns by gradients."""

    def summary(self, metrics):
        loss = self.processes.mean(torch.stack([loss for loss, _ in metrics]).mean(0))
        right = self.processes.mean(torch.stack([right for _, right in metrics]).mean())
        return self.describe(loss, float(right))

    def describe(self, loss, right):
        scales = [float(part.mean()) for part in loss.split(self.sizes)]
        text = f"per-scale {' '.join(f'{x:.2f}' for x in scales)} | right {right:.1%}"
        numbers = dict(per_scale=scales, right=right)
        # Half precision cannot tell products apart that are multiplied by much: 100 is the most.
        if self.settings.precision != "float32" and self.model.config.qk_norm:
            factors = [block.attention.log_scale.detach() for block in self.model.blocks]
            largest = max(float(checkpoints.whole(factor).max()) for factor in factors)
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


# -- Models from files -----------------------------------------------------------------------------

def load_tokenizer(path):
    """-> (frozen MultiScaleVQVAE in eval mode, its checkpoint without the weights)"""
    return load_model(path, "tokenizer", vqvae.MultiScaleVQVAE, vqvae.TokenizerConfig)


def load_transformer(path):
    """-> (frozen VAR in eval mode, its checkpoint without the weights)"""
    return load_model(path, "transformer", transformer.VAR, transformer.VARConfig)


def load_model(path, part, model_class, config_class):
    about = load_part(path, part)
    try:
        model = model_class(config_class(**about.pop("config")))
        model.load_state_dict(about.pop("model"))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise BadInput(f"{path}: does not hold a {part} ({reason})") from None
    return model.eval().requires_grad_(False), about


def open_tokenizer(path, scales):
    """A tokenizer trained here, or one in the released layout, which does not tell its `scales`.
    -> frozen MultiScaleVQVAE in eval mode"""
    state = load_checkpoint(path)
    if {"config", "tokenizer"} & state.keys():
        return load_tokenizer(path)[0]
    sizes, weights = released.read_tokenizer(state, scales)
    with released.other_layouts_refused(), released.weights_to_come():
        tokenizer = vqvae.MultiScaleVQVAE(vqvae.TokenizerConfig(**sizes))
    return released.fill(tokenizer, weights)


def open_run_tokenizer(settings, folder, scales):
    """The tokenizer of --stage transformer: the run's own, or that of --tokenizer-file.
    -> MultiScaleVQVAE, its checkpoint without the weights (None: not yet saved in the folder)
    Raises BadInput if there is none, or if it is not the one that the run began with."""
    path, file = folder.checkpoint("tokenizer"), settings.tokenizer_file
    if not file and not path.exists():
        raise BadInput(f"no tokenizer in {path.parent}: train it first, with --stage tokenizer, or "
                       "give --tokenizer-file")
    own, about = load_tokenizer(path) if path.exists() else (None, None)
    if not file:
        return own, about
    given = open_tokenizer(file, scales)
    is_replaced = settings.fresh and not (about and about["step"])     # one trained here never is
    if own and not is_replaced and model_fingerprint(given) != model_fingerprint(own):
        way_out = ("give another folder with --out" if about["step"] else
                   "--fresh starts over with the latter, --out takes another folder")
        raise BadInput(f"{path} is another tokenizer than {file}; {way_out}")
    return given, None if is_replaced else about


# -- The whole road --------------------------------------------------------------------------------

def var_sizes(var_config, config, num_classes):
    """-> VARConfig: some sizes follow from the tokenizer and from the data."""
    return replace(var_config, num_classes=num_classes, scales=config.scales,
                   vocab_size=config.vocab_size, latent_dim=config.latent_dim)


def train_all(settings, config, var_config):
    """Both stages, or the one of --stage. On return nothing of them is left in memory."""
    again = "the same command" + " without --fresh" * settings.fresh
    with (Processes(settings.device) as processes,
          RunFolder(settings.out, writes=processes.rank == 0) as folder,
          StopSignal(processes, again) as stop):
        if settings.precision == "auto":
            before = None if settings.fresh else folder.settings().get("precision")
            settings.precision = choose_precision(processes, before)
        if settings.stage == "transformer":                # its tokenizer sets the image size
            tokenizer, about = open_run_tokenizer(settings, folder, config.scales)
            config = tokenizer.config
        all_data, data, class_names = processes.first_alone(partial(
            load_splits, settings.dataset, config.image_size, settings.data_dir, settings.classes))
        settings.classes = tuple(class_names) if settings.classes else ()    # however asked for
        recipe = follow_recipe(settings, len(data["train"][0]))
        sizes = var_sizes(var_config, config, len(class_names))
        everything = {**asdict(settings), **asdict(config), **asdict(sizes)}
        announce(processes, everything, recipe, *[len(images) for images, _ in data.values()])
        if settings.stage != "transformer":
            train(TokenizerStage(settings, processes, folder, config, all_data["train"][0],
                                 all_data["test"][0], class_names), folder, stop, everything)
            free_gpu_memory()
        if settings.stage != "tokenizer":
            if settings.stage == "all":
                tokenizer, _ = load_tokenizer(folder.checkpoint("tokenizer"))
            elif not about:
                checkpoints.adopt_tokenizer(folder, tokenizer, class_names, settings.dataset)
            elif about["step"] < (planned := about["settings"].get("tokenizer_steps", 0)):
                processes.say(f"note: the tokenizer was trained for {about['step']} steps of "
                              f"{planned}")
            train(on_tokens(settings, processes, folder, stop, tokenizer, sizes, data, class_names),
                  folder, stop, everything)
            if processes.rank == 0 and settings.export:
                checkpoints.export(folder.path, settings.export)


def on_tokens(settings, processes, folder, stop, tokenizer, sizes, data, class_names):
    """-> TransformerStage on the tokens of these images, which are made here"""
    path = folder.checkpoint("transformer")
    tokenizer = lay_out(tokenizer, processes.device, settings.precision)
    # Before tokens are made again: a command that is refused changes nothing, and what a command
    # with --fresh leaves when it is stopped here must not pass for its own.
    if settings.fresh:
        folder.remove(path.name)
    elif path.exists():
        checkpoints.check_identity(path, load_checkpoint(path), "transformer",
                                   TransformerStage.identity(settings, tokenizer, sizes))
    processes.barrier()
    tokens = {}
    for split, (images, labels) in data.items():
        views = Views(images, settings.views if split == "train" else 1, settings.workers)
        found = cache_tokens(settings, processes, folder, stop, tokenizer, views, split)
        tokens[split] = found, labels
    return TransformerStage(settings, processes, tokenizer, sizes, tokens, class_names)


def draw_samples(settings):
    """Chapter 6 on this run, as you would call it. -> exit status"""
    script = Path(__file__).with_name("06_sample_and_edit.py")
    return subprocess.call([sys.executable, str(script), "--run", settings.out, "--out",
                            settings.out, "--device", settings.device, "--data-dir",
                            settings.data_dir])


def dry_run(settings, config, var_config):
    """Print what a training takes. Nothing is read, written or trained."""
    with torch.device("meta"):                             # tensors with shapes but no memory
        tokenizer = vqvae.MultiScaleVQVAE(config)
        var = transformer.VAR(var_sizes(var_config, config, var_config.num_classes))
    plan.show(settings, tokenizer, var)


def main():
    settings, config, var_config = read_settings()
    if settings.dry_run:
        return dry_run(settings, config, var_config)
    if settings.gpus > 1 and "RANK" not in os.environ:
        load_data(settings.dataset, "test", config.image_size, settings.data_dir)   # or fail here
        return relaunch(settings.gpus, settings.device)
    train_all(settings, config, var_config)
    free_gpu_memory()                                      # chapter 6 needs it
    if settings.stage != "tokenizer" and settings.steps and os.environ.get("RANK", "0") == "0":
        return draw_samples(settings)


if __name__ == "__main__":
    one_line(main)
