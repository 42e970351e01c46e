"""Training in float16, on GPUs that have no bfloat16."""
import torch


class LossScale(torch.nn.Module):
    """float16 holds nothing below 6e-8, and many gradients are smaller. So the loss is multiplied
    by `factor` before it goes backward, and the gradients are divided by it afterwards. A step that
    overflows is skipped and halves the factor; 1,000 good steps in a row double it.

    The rule and the numbers are those of torch.amp.GradScaler in the original code. Ours takes the
    verdict of all processes and optimizers together, is saved with the other modules of a stage,
    and never falls below 1. In other precisions nothing is multiplied and nothing is saved."""

    def __init__(self, precision, interval=1000):
        super().__init__()
        self.needed, self.interval = precision == "float16", interval
        if self.needed:
            self.register_buffer("factor", torch.tensor(2.0 ** 11))
            self.register_buffer("good_steps", torch.tensor(0))

    def scale(self, loss):
        return loss * self.factor if self.needed else loss

    @torch.no_grad()
    def unscale(self, modules):
        """Divide the gradients of all parameters of these modules."""
        gradients = [p.grad for module in modules for p in module.parameters()
                     if p.grad is not None]
        if self.needed and gradients:
            torch._foreach_mul_(gradients, 1 / self.factor)

    def update(self, skipped):
        """After a step. skipped: () bool tensor"""
        if self.needed:
            self.good_steps.add_(1).mul_(~skipped)
            grow = self.good_steps == self.interval
            self.good_steps.mul_(~grow)
            self.factor.mul_(1 + grow.float() - 0.5 * skipped).clamp_(min=1)

    @property
    def is_lowest(self):
        """Is it of no use to try a smaller factor? bool, () tensor in float16"""
        return self.factor <= 1 if self.needed else True
