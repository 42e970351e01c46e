"""Steps whose loss or gradient is not finite (infinite, or not a number) change nothing."""
import torch

from engine import BadInput


def clip_gradients(module, limit):
    """Scale the module's gradient down to the norm `limit` if it is larger. -> its norm before, ()
    """
    norm = torch.nn.utils.clip_grad_norm_(list(module.parameters()), limit)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm      # of all shards


def step_unless(skipped, optimizers):
    """Let the optimizers step unless `skipped` is true, then clear the gradients. skipped: () bool
    tensor. On a GPU the fused optimizers read it themselves, so Python does not wait for it."""
    for optimizer in optimizers:
        optimizer.found_inf = skipped.float()
        if skipped.is_cuda or not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class SkippedInARow:
    """Ends a stage after ten skipped steps in a row."""

    def __init__(self, stage, device):
        self.stage, self.count = stage, torch.zeros((), device=device)
        # Looking at the count makes Python wait for a GPU, so there only every tenth step looks.
        self.every = 1 if device.type == "cpu" else 10

    def add(self, step, skipped):
        """step: number of this step, from 1; skipped: () bool tensor. Raises BadInput"""
        self.count = (self.count + 1) * skipped
        if step % self.every == 0 and self.count >= 10:
            raise BadInput(f"{self.stage}: no finite loss or gradient in {int(self.count)} steps, "
                           f"last at step {step - 1}; the checkpoint is from before. Lower the "
                           "learning rate and train this stage again, with --fresh --stage "
                           f"{self.stage}")
