"""The dry run: what a training would cost, before anyone pays for it.

Arithmetic is counted on torch's "meta" device, where tensors have shapes but no memory, by running
the real models forwards and backwards; what a step keeps for its backward pass is counted on small
real ones and scaled up. Days follow from an assumed share of the GPUs' peak (model FLOP
utilisation, MFU): work done twice by activation checkpointing does not count as work. Small models
never reach it: their kernels end sooner than Python can ask for the next.
"""
import contextlib
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from engine import perceptual
from engine.progress import clock

IMAGENET = 1_281_167                                       # pictures to train on
LAUNCH = 10e-6                                             # seconds to ask for a kernel, assumed


def show(settings, processes, config, tokenizer_class, var_config, var_class):
    """Print the plan of both stages. The classes are those of chapters 2 and 4, the configs
    theirs; nothing is read, written or trained."""
    print(f"dry run, nothing is read or trained: {processes} GPU(s) of {settings.gpu_tflops:g} "
          f"TFLOP/s, of which {settings.mfu:.0%} are reached (--gpu-tflops, --mfu)\n"
          f"{'':<12}{'parameters':>11}{'batch':>7}{'per GPU':>9}{'steps':>10}{'TFLOP/step':>12}"
          f"{'GB per GPU':>12}{'time':>11}")
    days = []
    for name, work, batch, steps in (
            ("tokenizer", TokenizerWork(settings, config, tokenizer_class),
             settings.tokenizer_batch_size, settings.tokenizer_steps),
            ("transformer", TransformerWork(settings, var_config, var_class),
             settings.batch_size, settings.steps)):
        parameters, per_picture, _ = work.flops()
        seconds = per_picture * batch / (processes * settings.gpu_tflops * 1e12 * settings.mfu)
        days.append(steps * max(seconds, LAUNCH * work.kernels()) / 86400)
        at_once = batch / processes / settings.accumulate
        bytes_ = work.state_bytes(parameters, processes) + at_once * work.kept_per_picture()
        print(f"{name:<12}{parameters / 1e6:>9.1f} M{batch:>7}{batch / processes:>9g}{steps:>10,}"
              f"{per_picture * batch / 1e12:>12.3g}{bytes_ / 1e9:>12.1f}{time_of(days[-1]):>11}")
    L = sum(side * side for side in config.scales)
    print("GB: weights, gradients and optimizer in float32, copies of the weights in "
          f"{half(settings)}, and what a step keeps\nfor its backward pass; torch needs some more\n"
          f"time: arithmetic; or asking for its kernels, {LAUNCH * 1e6:.0f} us each, where that "
          "takes longer")
    if settings.dataset == "imagenet":
        *_, encode = TokenizerWork(settings, config, tokenizer_class).flops()
        size = settings.views * IMAGENET * L * (2 if config.vocab_size < 65536 else 4)
        days.append(encode * settings.views * IMAGENET
                    / (processes * settings.gpu_tflops * 1e12 * settings.mfu) / 86400)
        print(f"token cache  {settings.views} views of {IMAGENET:,} pictures: {size / 1e9:.1f} GB "
              f"on disk, {time_of(days[-1])} (if decoding the pictures keeps up)")
    else:
        print("             and what it takes to tokenize all pictures, to evaluate and to draw")
    print(f"together     {time_of(sum(days))}")


def time_of(days):
    return f"{days:.1f} days" if days > 0.2 else clock(86400 * days)


def half(settings):
    return "float32" if settings.precision == "float32" else "bfloat16"


class Kernels(TorchDispatchMode):
    """Counts operations that compute, unlike those that only look at a tensor in another way."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func.name().startswith("aten::empty"))
        return func(*args, **(kwargs or {}))


class Work:
    """One picture's share of a training step: its arithmetic, and what it keeps in memory."""
    shards = False                                         # does --shard spread its weights?
    all_kernels = 1.5     # those of a whole step over those of forward and backward pass, counted

    def __init__(self, settings, config, model_class):
        self.settings, self.config, self.model_class = settings, config, model_class

    def flops(self):
        """-> (parameters, FLOPs of a training step per picture, FLOPs to use the model once)"""
        with torch.device("meta"):
            model = self.model_class(self.config).eval()   # training noise costs nothing
            with FlopCounterMode(display=False) as once, torch.no_grad():
                self.use(model)
            with FlopCounterMode(display=False) as counter:
                self.loss(model, self.config, 1).backward()
        parameters = sum(p.numel() for p in model.parameters())
        return parameters, counter.get_total_flops(), once.get_total_flops()

    def kernels(self):
        """About how many a training step asks for, whatever the batch: those of the forward and the
        backward pass are counted, the others (rounding, clipping, optimizers) a share of them."""
        with torch.device("meta"), Kernels() as counter:
            self.loss(self.model_class(self.config).eval(), self.config, 1).backward()
        return self.all_kernels * counter.count * self.settings.accumulate

    def state_bytes(self, parameters, processes):
        """Weights 4, gradients 4, AdamW 8 (Muon 4), copies in half precision 2 bytes each."""
        each = 16 if half(self.settings) == "float32" else 18
        return each * parameters / (processes if self.settings.shard and self.shards else 1)

    def kept(self, config, **flags):
        """Bytes that a real forward pass keeps for a second picture beside the first, so that
        weights and their copies do not count."""
        sizes = []
        for batch in (1, 2):
            storages = {}

            def note(tensor):
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
                return tensor
            model = self.model_class(config).eval()
            for name, value in flags.items():
                setattr(model, name, value)
            for module in model.modules():                 # a GPU takes norms in float32
                if isinstance(module, torch.nn.GroupNorm):
                    module.register_forward_pre_hook(lambda _, args: (args[0].float(),))
            low = (contextlib.nullcontext() if half(self.settings) == "float32"
                   else torch.autocast("cpu", torch.bfloat16))
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), low:
                loss = self.loss(model, config, batch)
            sizes.append(sum(storage.nbytes() for storage in storages.values()))
            del loss
        return sizes[1] - sizes[0]


class TokenizerWork(Work):
    all_kernels = 2.6

    def loss(self, model, config, batch):
        """Stage 1's losses, those of VQGAN included where they are asked for. The rounding in
        between is left out: less than 1 % of the arithmetic for ImageNet."""
        image = torch.zeros(batch, 3, config.image_size, config.image_size)
        rebuilt = model.decode(model.encode(image))
        loss = F.mse_loss(rebuilt, image)
        if self.settings.perceptual:
            loss = loss + perceptual.Perceptual()(rebuilt, image).mean()
        if self.settings.adversarial:
            critic = perceptual.Discriminator(config.image_size)
            loss = loss + perceptual.hinge(*critic(torch.cat([image, rebuilt.detach()])).chunk(2))
            loss = loss - critic.requires_grad_(False)(rebuilt).mean()
        return loss

    def use(self, model):
        side = self.config.image_size
        return model.encode(torch.zeros(1, 3, side, side))

    def kept_per_picture(self):
        """Measured on pictures of a quarter of the side, if that leaves a map of at least 2x2."""
        side = self.config.scales[-1]
        shrink = 4 if side >= 8 and side % 4 == 0 and self.config.image_size >= 128 else 1
        small = replace(self.config, image_size=self.config.image_size // shrink,
                        scales=(side // shrink,))
        return shrink ** 2 * self.kept(small)


class TransformerWork(Work):
    shards = True

    def loss(self, model, config, batch):
        """Stage 2's cross-entropy."""
        L = sum(side * side for side in config.scales)
        labels = torch.zeros(batch, dtype=torch.long)
        inputs = torch.zeros(batch, L - config.scales[0] ** 2, config.latent_dim)
        logits = model(labels, inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.repeat_interleave(L))

    def use(self, model):
        return self.loss(model, self.config, 1)

    def kept_per_picture(self):
        """Measured on one and two narrow blocks; a block keeps something proportional to its width,
        the head and the loss something else."""
        width = 128
        one, two = (replace(self.config, depth=depth, width=width, heads=2) for depth in (1, 2))
        first, block = self.kept(one), self.kept(two) - self.kept(one)
        rest, wider = first - block, self.config.width / width
        if self.settings.activation_checkpointing:         # the input of every block, and one block
            thin = (self.kept(two, activation_checkpointing=True)
                    - self.kept(one, activation_checkpointing=True))
            return rest + wider * (self.config.depth * thin + block)
        return rest + wider * self.config.depth * block
