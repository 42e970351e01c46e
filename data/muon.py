"""Muon, an optimizer for the matrices inside a transformer's blocks."""
import torch


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024): every direction of a matrix
    learns equally fast. torch.optim.Muon does the same, but always multiplies in bfloat16, which
    some CPUs only emulate, and one matrix at a time; this one stacks matrices of equal shape.
    A convolution (out, in, h, w) counts as a matrix (out, in*h*w). dtype: of the products."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """Where the attribute `found_inf`, a tensor (), is not 0, nothing changes: as torch's own
        fused optimizers have it, nobody has to wait for the GPU to decide."""
        good = getattr(self, "found_inf", torch.zeros(())) == 0
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                g = torch.where(good, p.grad, momentum)    # lerp from x to x: x stays
                momentum.lerp_(g, 1 - group["momentum"])
                update = g.lerp(momentum, group["momentum"])               # Nesterov
                by_shape.setdefault(p.flatten(1).shape, []).append((p, update.flatten(1)))
            for (rows, columns), pairs in by_shape.items():
                size = group["lr"] * max(1, rows / columns) ** 0.5
                updates = orthogonal(torch.stack([update for _, update in pairs]), self.dtype)
                for (p, _), update in zip(pairs, updates):
                    step = size * update.view_as(p) + group["lr"] * group["weight_decay"] * p
                    p.sub_(torch.where(good, step, 0.0))


def orthogonal(g, dtype=torch.float32):
    """Nearest matrix with singular values about 1, by five Newton-Schulz steps. (n, r, c)"""
    tall = g.shape[1] > g.shape[2]
    x = (g.mT if tall else g).to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(g.dtype)
