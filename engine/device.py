"""Which device to compute on, and in which precision."""
import contextlib
import os
import time

import torch

from engine import BadInput


def best_device():
    """What "auto" stands for on this machine."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_device(name):
    """ "auto", "cpu" or "cuda" -> torch.device. Under torchrun each process gets its own GPU.
    Raises BadInput if there is no GPU."""
    name = best_device() if name == "auto" else name
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch finds no CUDA GPU on this machine; use --device cpu")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def fast_bfloat16(device):
    """Is bfloat16 faster than float32? Some CPUs have units for it, others emulate it ten times
    slower, so a CPU is judged by timing one small product of each kind."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(256, 256).to(dtype)
        tries = []
        for _ in range(5):
            begin = time.perf_counter()
            a @ a
            tries.append(time.perf_counter() - begin)
        seconds[dtype] = min(tries)
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


def best_precision(device):
    """What "auto" stands for: bfloat16 where it is fast, float16 on older GPUs, else float32."""
    if fast_bfloat16(device):
        return "bfloat16"
    return "float16" if device.type == "cuda" else "float32"


def autocast(device, precision):
    """A context in which products and convolutions are computed in this precision."""
    if device.type == "cpu":
        # On a CPU the backward pass of fused attention is slow in half precision. In spite of
        # their names, these settings of torch act on CPUs, too.
        torch.backends.cuda.enable_flash_sdp(precision == "float32")
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))


def cores():
    """The number of CPU cores that this process may use; a cluster often grants only a few."""
    granted = getattr(os, "sched_getaffinity", None)
    return len(granted(0)) if granted else os.cpu_count() or 1
