"""AdamW, and Muon (Jordan et al. 2024) for the matrices inside the blocks."""
import math
import re

import torch

from engine import BadInput
from engine.distributed import say

# Where Muon is used: the blocks of the transformer, and those of the encoder and the decoder.
INSIDE_BLOCKS = r"^blocks\..*(attention|mlp)|^(en|de)coder\.(levels|middle)"


def make_optimizers(model, lr, weight_decay, kind="adamw", precision="float32"):
    """A list with AdamW and, if kind is "muon", Muon for the matrices inside the blocks, computing
    in this precision. Only weights of linear layers and convolutions decay."""
    matrices = {id(module.weight) for module in model.modules()
                if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    inside, decayed, plain = [], [], []
    for name, p in model.named_parameters():
        if id(p) not in matrices:
            plain.append(p)
        elif kind == "muon" and re.search(INSIDE_BLOCKS, name):
            inside.append(p)
        else:
            decayed.append(p)
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]
    if inside:
        optimizers.append(Muon(inside, weight_decay, getattr(torch, precision)))
    return optimizers


def set_schedule(optimizers, progress, share, final_decay=None):
    """Set every learning rate to this share of its first value. Weight decay, where there is any,
    moves to `final_decay` along half a cosine. progress: from 0 to 1"""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("first_lr", group["lr"]) * share
            decay = group.setdefault("first_decay", group["weight_decay"])
            if final_decay is not None and decay:
                done = (1 - math.cos(math.pi * progress)) / 2
                group["weight_decay"] = decay + done * (final_decay - decay)


def take_step(optimizers, norm, skipped, scaler=None):
    """Let the optimizers step, unless the norm of the gradient is not finite, and clear the
    gradients. skipped: how many steps in a row were skipped before; scaler: a torch GradScaler
    -> how many now. Raises BadInput at ten"""
    scaler = scaler or torch.amp.GradScaler(enabled=False)           # which steps plainly
    skipped = 0 if norm.isfinite() else skipped + 1
    for optimizer in optimizers:
        if not skipped:
            scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()
    if skipped:
        say(f"  skipped a step whose gradient was not finite, {skipped} in a row")
    if skipped == 10:
        raise BadInput("ten steps in a row had no finite gradient: lower the learning rate and "
                       "train this stage again with --fresh")
    return skipped


class Muon(torch.optim.Optimizer):
    """Gradient descent with momentum whose update is made nearly orthogonal: the singular
    values that matter become about equal, so a few directions cannot dominate the update.

    torch.optim.Muon is the same algorithm, but it takes no convolutions and always multiplies in
    bfloat16, which some CPUs only emulate. This one treats a convolution (out, in, h, w) as a
    matrix (out, in*h*w). dtype: the precision of the products."""

    def __init__(self, params, weight_decay, dtype=torch.float32, lr=0.02, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = {}                                # matrices of equal shape are stacked
            for p in group["params"]:
                if p.grad is not None:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    same_shape.setdefault((len(p), p[0].numel()), []).append(p)
            for (rows, columns), params in same_shape.items():
                g = torch.stack([p.grad.flatten(1) for p in params])           # (n, rows, columns)
                kept = [self.state[p]["momentum"].flatten(1) for p in params]
                torch._foreach_lerp_(kept, list(g.unbind(0)), 1 - group["momentum"])
                update = g.lerp(torch.stack(kept), group["momentum"])          # Nesterov momentum
                update = orthogonal(update, self.dtype)
                update.mul_(group["lr"] * max(1, rows / columns) ** 0.5)
                for p, change in zip(params, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(change.view_as(p))


def orthogonal(g, dtype=torch.float32):
    """Five Newton-Schulz steps with the coefficients of Jordan et al. They keep the singular
    vectors and move every singular value above about 0.0016 of the Frobenius norm to between
    roughly 0.68 and 1.2; smaller ones stay small. (n, rows, columns) -> the same shape"""
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(g.dtype)
