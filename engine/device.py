"""Which device to compute on, and in which precision."""
import os
import timeit

import torch

from engine import BadInput


def pick_device(name):
    """ "auto", "cpu" or "cuda" -> torch.device. Under torchrun each process gets its own GPU.
    Raises BadInput if there is no GPU."""
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise BadInput("--device cuda: torch finds no CUDA GPU on this machine; use --device cpu")
    if name == "cpu" or not found:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def best_precision(device):
    """What "auto" stands for: bfloat16 where it is fast, float16 on older GPUs, else
    float32. Some CPUs have units for bfloat16, others emulate it ten times slower, so a CPU
    is judged by timing one small product of each kind."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if fast else "float16"
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(256, 256).to(dtype)
        seconds.append(min(timeit.repeat(lambda: a @ a, number=1, repeat=5)))
    return "bfloat16" if seconds[0] < 0.7 * seconds[1] else "float32"


def autocast(device, precision):
    """A context in which products and convolutions are computed in this precision."""
    if device.type == "cpu":
        # On a CPU the backward pass of fused attention is slow in half precision. In spite of
        # their names, these settings of torch act on CPUs, too.
        torch.backends.cuda.enable_flash_sdp(precision == "float32")
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


def cores():
    """The number of CPU cores that this process may use; a cluster often grants only a few."""
    granted = getattr(os, "sched_getaffinity", None)
    return len(granted(0)) if granted else os.cpu_count() or 1
