"""Which device to use, in which precision, and how to get there and off again."""
import contextlib
import gc
import os
import time

import numpy as np
import torch
import torch.nn.functional as F

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


def cores():
    """How many cores this process may use: a cluster often gives it some of the machine's only."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loading_workers(processes):
    """How many processes each of the training processes on this machine may start to decode image
    files: its share of the cores, up to 16."""
    return min(16, max(1, cores() // processes))


def lay_out(model, device, precision="float32"):
    """The model on its device, its convolutions in the memory layout that is fastest there.

    On a CPU channels_last is faster in float32: experiments/benchmark.py measures both. On a GPU
    group norms return the usual layout whatever they are given, so that every convolution would
    have to copy its input."""
    last = device.type == "cpu" and precision == "float32"
    return model.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)


def prepare_to_sample(tokenizer, var, device, precision="auto"):
    """Move both models to the device; the linear layers of the transformer and the decoder compute
    in sampling_precision(), what encodes images stays exact. -> how many images fit into memory"""
    lay_out(tokenizer, device)
    if var is None:                                        # only reconstructions are wanted
        return 100
    sizes = [sum(p.numel() for p in model.parameters()) for model in (tokenizer, var)]
    dtype = sampling_precision(precision, device, sizes[1])
    linear = [layer for layer in var.to(device).modules() if isinstance(layer, torch.nn.Linear)]
    for layer in (*linear, tokenizer.decoder, tokenizer.post_quant_conv):
        layer.to(dtype)
    if dtype != torch.float32:
        for method in ("conditioning", "forward", "step"):
            setattr(var, method, torch.autocast(device.type, dtype)(getattr(var, method)))
    # Keys and values for both halves of guidance, and a few of the decoder's widest maps.
    c, v = tokenizer.config, var.config
    at_once = images_that_fit(device, 4 * v.depth * var.L * v.width * dtype.itemsize
                              + 24 * c.channels * c.image_size ** 2)
    print(f"tokenizer {sizes[0] / 1e6:.1f} M, transformer {sizes[1] / 1e6:.1f} M parameters, "
          f"{(4 * sizes[0] + dtype.itemsize * sizes[1]) / 1e6:,.0f} MB; {at_once} images at once")
    return at_once


def sampling_precision(asked, device, parameters):
    """What --precision auto means in chapter 6: float32, but half precision for models above 100 M
    parameters where that is fast. -> torch.dtype"""
    if asked != "auto":
        return getattr(torch, asked)
    if parameters < 1e8:
        return torch.float32
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if fast_bfloat16(device) else torch.float32


def images_that_fit(device, each):
    """How many images of `each` bytes to work on at once, 1 to 100. It depends on the machine, not
    on what is free just now, so that a seed repeats its images."""
    room = 1e9
    if device.type == "cuda":
        room = 0.3 * torch.cuda.get_device_properties(device).total_memory
    return int(min(max(1, room // each), 100))


def choose_precision(processes, before=None):
    """What --precision auto means: what the run used before, else what is fast here. One answer for
    all processes."""
    known = "float32", "bfloat16", "float16"
    if before not in known:
        before = known[1] if fast_bfloat16(processes.device) else known[0]
        # Since 2017 (V100, T4) NVIDIA's GPUs multiply float16 several times faster than float32.
        if before == "float32" and processes.device.type == "cuda" and (
                torch.cuda.get_device_capability(processes.device) >= (7, 0)):
            before = "float16"
    return known[processes.of_first(known.index(before))]


def autocast(device, precision):
    """A context in which products and convolutions are computed in this precision."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))


class GroupNorm(torch.nn.GroupNorm):
    """In the precision of x, also under autocast. Its own rule for CUDA is float32, which doubles
    the bytes and copies every activation twice; the kernel sums in float32 in any case."""
    mixed = ("cpu",)       # devices whose kernel takes half-precision x with float32 weights

    def __init__(self, channels, groups):
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x):
        dtype = self.weight.dtype if x.device.type in self.mixed else x.dtype
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(dtype), self.bias.to(dtype),
                                self.eps)


def to_device(tensor, device):
    """Without waiting for the GPU to finish what it is doing."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def move_small_arrays_to_gpu(arrays, device):
    """Arrays that fit beside a model (1 GB together) become tensors on the GPU. Others stay what
    and where they are, in memory or in a file, and so do all without a GPU."""
    in_memory = all(isinstance(array, np.ndarray) for array in arrays)
    if device.type != "cuda" or not in_memory or sum(a.nbytes for a in arrays) > 2 ** 30:
        return arrays
    signed = [a.astype(np.int32) if a.dtype == np.uint16 else a for a in arrays]
    return tuple(torch.from_numpy(array).to(device) for array in signed)


def reset_peak_memory(device):
    """Count the peak of GPU memory from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    """The most GPU memory in use since reset_peak_memory, as text; nothing without a GPU."""
    if device.type != "cuda":
        return ""
    return f", {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB of the GPU at most"


def free_gpu_memory():
    """Give back what deleted tensors leave, for other processes and larger blocks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
