"""Which device to use, and whether it is fast in bfloat16."""
import os
import time

import torch

from engine import BadInput


def best_device():
    """What `--device auto` means on this machine."""
    return ("cuda" if torch.cuda.is_available() else
            "mps" if torch.backends.mps.is_available() else "cpu")


def pick_device(name, rank=0):
    """auto, cpu, cuda or mps -> torch.device, of this process's GPU. Raises BadInput if it is not
    there."""
    name = best_device() if name == "auto" else name
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this machine has no CUDA GPU that torch can use; try cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise BadInput("--device mps: this machine has no Apple GPU; try cpu")
    torch.backends.cudnn.allow_tf32 = False                # float32 means float32
    return torch.device(name, rank) if name == "cuda" else torch.device(name)


def fast_bfloat16(device):
    """Does bfloat16 pay here? GPUs: ask. CPUs: some have units for it, others emulate it ten times
    slower, so time one small product of each kind."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, tries = torch.randn(256, 256).to(dtype), []
        for _ in range(5):
            begin = time.perf_counter()
            a @ a
            tries.append(time.perf_counter() - begin)
        seconds[dtype] = min(tries)
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


def loading_workers(processes):
    """How many processes each of the training processes on this machine may start to decode image
    files: its share of the cores, up to 16. A core decodes about 300 images of 256 px a second."""
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
             else os.cpu_count() or 1)
    return min(16, max(1, cores // processes))


def prepare_to_sample(tokenizer, var, device, precision="auto"):
    """Move both models to the device, large ones in half precision where that is fast: the linear
    layers of the transformer and the decoder. What encodes images stays exact.
    -> how many images fit into memory at once; it depends on the machine alone, so that a seed
    repeats its images"""
    tokenizer.to(device)
    if var is None:                                        # only reconstructions are wanted
        return 100
    sizes = [sum(p.numel() for p in model.parameters()) for model in (tokenizer, var)]
    dtype = torch.float32
    if precision != "auto":
        dtype = getattr(torch, precision)
    elif sizes[1] > 1e8 and device.type == "cuda":
        dtype = torch.float16
    elif sizes[1] > 1e8 and fast_bfloat16(device):
        dtype = torch.bfloat16
    linear = [layer for layer in var.to(device).modules() if isinstance(layer, torch.nn.Linear)]
    for layer in (*linear, tokenizer.decoder, tokenizer.post_quant_conv):
        layer.to(dtype)
    if dtype != torch.float32:
        for method in ("conditioning", "forward", "step"):
            setattr(var, method, torch.autocast(device.type, dtype)(getattr(var, method)))
    c, v, room = tokenizer.config, var.config, 1e9
    if device.type == "cuda":
        room = 0.3 * torch.cuda.get_device_properties(device).total_memory
    # Keys and values for both halves of guidance, and a few of the decoder's widest maps.
    each = 4 * v.depth * var.L * v.width * dtype.itemsize + 24 * c.channels * c.image_size ** 2
    at_once = int(min(max(1, room // each), 100))
    print(f"tokenizer {sizes[0] / 1e6:.1f} M, transformer {sizes[1] / 1e6:.1f} M parameters, "
          f"{(4 * sizes[0] + dtype.itemsize * sizes[1]) / 1e6:,.0f} MB; {at_once} images at once")
    return at_once
