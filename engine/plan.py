"""The dry run: what a training takes, counted on the real models without their memory."""
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.optimizers import optimizer_bytes


def flops(forward):
    """Arithmetic of a forward and a backward pass, a product and its sum counted as two.
    forward: function without arguments -> tensor, of a model on the "meta" device"""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        forward().sum().backward()
    return counter.get_total_flops()


def show(settings, tokenizer, var):
    """Print the size of an image, a line for each stage, and the size of the token cache.
    tokenizer, var: models on the "meta" device"""
    c, L = tokenizer.config, var.L
    with torch.device("meta"):
        image = torch.zeros(1, 3, c.image_size, c.image_size)
        label = torch.zeros(1, dtype=torch.long)
        inputs = torch.zeros(1, L - var.first, c.latent_dim)
    print(f"dry run: an image of {c.image_size} x {c.image_size} is {L} tokens, {len(c.scales)} "
          f"maps of sides {', '.join(map(str, c.scales))}")
    print(f"{'':<12}{'parameters':>11}{'batch':>7}{'steps':>12}{'TFLOP':>11}{'weights':>9}"
          f"{'gradients':>10}{'optimizer':>10} GB")
    line("tokenizer", tokenizer, lambda: tokenizer.decode(tokenizer.encode(image)),
         settings.tokenizer_batch_size, f"{settings.tokenizer_steps:,}", settings.optimizer)
    line("transformer", var, lambda: var(label, inputs), settings.batch_size,
         f"{settings.epochs} epochs" if settings.epochs else f"{settings.steps:,}",
         settings.optimizer)
    size = settings.views * L * (2 if c.vocab_size < 65536 else 4)
    print(f"token cache: {settings.views} views, {size / 1e3:.3g} MB for every 1,000 images\n"
          "TFLOP: forward and backward pass of one batch, without LPIPS and critic\nGB: on every "
          "GPU, in float32 (--shard divides them); activations come on top")


def line(name, model, forward, batch, steps, optimizer):
    """Print one line about a stage. forward: see `flops`, of one image"""
    count, work = sum(p.numel() for p in model.parameters()), batch * flops(forward)
    kept = optimizer_bytes(model, optimizer)
    print(f"{name:<12}{count / 1e6:>9,.1f} M{batch:>7}{steps:>12}{work / 1e12:>11,.3f}"
          f"{4 * count / 1e9:>9.3f}{4 * count / 1e9:>10.3f}{kept / 1e9:>10.3f}")
