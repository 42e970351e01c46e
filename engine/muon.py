"""Muon, an optimizer for matrices: of a transformer's blocks, of a tokenizer's convolutions."""
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
    x = (g.mT if tall else g).to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(g.dtype)
