"""Steps whose loss or gradient is not finite (infinite, or not a number) change nothing."""
import torch


def clip_gradients(module, limit):
    """Scale the gradient down to the norm `limit`, if it is larger. -> its norm before, ()"""
    norm = torch.nn.utils.clip_grad_norm_(list(module.parameters()), limit)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm        # sharded: the whole


def step_unless(skipped, optimizers):
    """The optimizers' step, or none of it where `skipped` (a bool tensor ()) is true; then the
    gradients are gone. On a GPU the fused optimizers look at it themselves, so that Python need not
    wait for the answer."""
    for optimizer in optimizers:
        optimizer.found_inf = skipped.float()
        if skipped.is_cuda or not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class SkippedInARow:
    """Counts skipped steps, from 0 again after each good one. The count stays on the device:
    looking at it waits for a GPU, so there only every tenth step does."""

    def __init__(self, device):
        self.count, self.every = torch.zeros((), device=device), 1 if device.type == "cpu" else 10

    def ten(self, step, skipped):
        """Were the last ten steps or more skipped? step: number of this one, from 1; skipped: ()
        bool tensor"""
        self.count = (self.count + 1) * skipped
        return step % self.every == 0 and bool(self.count >= 10)
