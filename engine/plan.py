"""The dry run: what a training takes, counted on the real models without their memory."""
import torch
from torch.utils.flop_counter import FlopCounterMode

HEADER = (f"{'':<12}{'parameters':>11}{'batch':>7}{'steps':>12}{'TFLOP':>11}{'weights':>9}"
          f"{'gradients':>10}{'optimizer':>10} GB")


def flops(forward):
    """Arithmetic of a forward and a backward pass, a product and its sum counted as two.
    forward: function without arguments -> tensor, of a model on the "meta" device"""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        forward().sum().backward()
    return counter.get_total_flops()


def optimizer_bytes(groups):
    """AdamW keeps two float32 moments of every weight, Muon one. groups: {kind: parameters}"""
    return sum((4 if kind == "muon" else 8) * p.numel() for kind in groups for p in groups[kind])


def show(name, model, forward, batch, steps, groups):
    """One line about a stage. forward: see `flops`, of one image; groups: see `optimizer_bytes`"""
    count, work = sum(p.numel() for p in model.parameters()), batch * flops(forward)
    print(f"{name:<12}{count / 1e6:>9,.1f} M{batch:>7}{steps:>12}{work / 1e12:>11,.3f}"
          f"{4 * count / 1e9:>9.3f}{4 * count / 1e9:>10.3f}{optimizer_bytes(groups) / 1e9:>10.3f}")
