"""Optimizers and their schedule: AdamW, and Muon for the matrices inside the blocks."""
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

# The blocks of the transformer, and those of the tokenizer's encoder and decoder.
INSIDE_BLOCKS = r"^blocks\..*(attention|mlp)|^(en|de)coder\.(levels|middle)"


def learning_rate(progress, final):
    """Share of the peak: warm-up over the first 2 %, flat to 5 %, then a straight line down."""
    if progress < 0.02:
        return 0.005 + 0.995 * progress / 0.02
    return 1 - (1 - final) * max(0.0, progress - 0.05) / 0.95


def set_schedule(optimizers, progress, final_lr, final_decay=None):
    """Learning rate of every parameter group, and weight decay of those that have one, which goes
    to `final_decay` along half a cosine, at this share of the training."""
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        group["lr"] = group.setdefault("peak", group["lr"]) * learning_rate(progress, final_lr)
        if final_decay is not None and group["weight_decay"]:
            first = group.setdefault("first_decay", group["weight_decay"])
            done = (1 - math.cos(math.pi * progress)) / 2
            group["weight_decay"] = first + (final_decay - first) * done


def parameter_groups(model, optimizer):
    """Weights of linear layers and convolutions decay; biases, embeddings, gains and the q/k
    temperature do not. optimizer: a name in OPTIMIZERS
    -> {"inside": weights inside the blocks that it trains, "decay", "plain": the rest, AdamW's}"""
    own = OPTIMIZERS[optimizer].make is not None
    decayed = {id(m.weight) for m in model.modules()
               if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    groups = {"inside": [], "decay": [], "plain": []}
    for name, p in model.named_parameters():
        inside = own and re.search(INSIDE_BLOCKS, name)
        groups["plain" if id(p) not in decayed else "inside" if inside else "decay"].append(p)
    return groups


def make_optimizers(model, lr, weight_decay, settings):
    """-> [AdamW], then the optimizer of the weights inside the blocks if it is another"""
    groups = parameter_groups(model, settings.optimizer)
    optimizers = [torch.optim.AdamW(
        [dict(params=groups["decay"], weight_decay=weight_decay),
         dict(params=groups["plain"], weight_decay=0.0)], lr=lr, betas=(0.9, 0.95), fused=True)]
    if groups["inside"]:
        make = OPTIMIZERS[settings.optimizer].make
        optimizers.append(make(groups["inside"], weight_decay, settings))
    return optimizers


def optimizer_bytes(model, optimizer):
    """What the optimizers of a model keep in memory. optimizer: a name in OPTIMIZERS"""
    groups = parameter_groups(model, optimizer)
    inside = sum(p.numel() for p in groups["inside"])
    rest = sum(p.numel() for p in groups["decay"] + groups["plain"])
    return OPTIMIZERS[optimizer].bytes * inside + OPTIMIZERS["adamw"].bytes * rest


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024), so that every direction of a
    matrix learns equally fast. dtype: of the products.

    torch.optim.Muon (torch 2.9 and later) is the same algorithm. It takes no convolutions, always
    multiplies in bfloat16, which some CPUs only emulate, works on one matrix at a time, and cannot
    skip a step. This one takes a convolution (out, in, h, w) as a matrix (out, in*h*w) and stacks
    matrices of equal shape."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """Where the attribute `found_inf`, a tensor (), is not 0, nothing changes, as in torch's
        fused optimizers. The GPU decides this, so the program need not wait for it."""
        good = getattr(self, "found_inf", torch.zeros(())) == 0
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                self.state[p].setdefault("momentum", torch.zeros_like(p))
                by_shape.setdefault((len(p), p[0].numel()), []).append(p)
            for (rows, columns), like in by_shape.items():           # a stack (n, rows, columns)
                kept = [self.state[p]["momentum"] for p in like]
                weight, momentum, g = [torch.stack([x.flatten(1) for x in tensors]) for tensors in
                                       (like, kept, [p.grad for p in like])]
                g = torch.where(good, g, momentum)         # lerp from x to x: x stays
                momentum = momentum.lerp(g, 1 - group["momentum"])
                update = orthogonal(g.lerp(momentum, group["momentum"]), self.dtype)   # Nesterov
                step = group["lr"] * (max(1, rows / columns) ** 0.5 * update
                                      + group["weight_decay"] * weight)
                weight = torch.where(good, weight - step, weight)
                for tensors, new in ((kept, momentum), (like, weight)):
                    torch._foreach_copy_(tensors, [x.view(p.shape) for x, p in zip(new, like)])


def orthogonal(g, dtype=torch.float32):
    """Nearest matrix with singular values about 1, by five Newton-Schulz steps, with the numbers of
    Jordan et al.: small singular values grow fast, all end between 0.7 and 1.2. (n, r, c)"""
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)        # float16 holds no 1e-8
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(g.dtype)


@dataclass(frozen=True)
class Kind:
    """What trains the weights inside the blocks; AdamW trains the rest.

    make(weights, weight_decay, settings) -> a torch optimizer, or None: AdamW trains these, too.
    Its step() must change nothing where its attribute `found_inf`, a tensor (), is not 0."""
    make: Callable | None
    bytes: int                  # that it keeps for each float32 weight
    works_on_shards: bool       # or does it need whole matrices?


def make_muon(weights, weight_decay, settings):
    return Muon(weights, lr=settings.muon_lr, weight_decay=weight_decay,
                dtype=getattr(torch, settings.precision))


# What --optimizer may name: Muon keeps one moment of every weight, AdamW two.
OPTIMIZERS = {"muon": Kind(make_muon, bytes=4, works_on_shards=False),
              "adamw": Kind(None, bytes=8, works_on_shards=True)}
